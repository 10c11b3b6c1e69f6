"""What each deployment target can hold."""

from __future__ import annotations

from collections.abc import Mapping

from edkm_export.errors import ConversionError
from edkm_export.palette import PalettizedTensor

__all__ = ["check_target"]


def check_target(palettized: Mapping[str, PalettizedTensor], target: str, source: str) -> None:
    """Refuse, before the long work, palettes that a target cannot hold.

    iOS16 and iOS17 take one float16 LUT a weight of 1, 2, 4, 6 or 8 bits; iOS18 takes every form.

    Args:
        palettized: weights by parameter name.
        target: one of `deployment_target.TARGETS`.
        source: where they are from, for the message.

    Raises:
        ConversionError: naming the weights, what they need and the target that can.
    """
    if target == "iOS18":
        return
    needs = {
        "grouped LUTs": (
            [name for name, tensor in palettized.items() if tensor.groups != (1, 1)],
            "palettize with --group-size 0",
        ),
        "3-bit indices": (
            [name for name, tensor in palettized.items() if tensor.n_bits == 3],
            "palettize with --bits 2 or 4",
        ),
        "vector LUTs": ([name for name, tensor in palettized.items() if tensor.dim > 1], "use scalar LUTs"),
        "int8 LUTs": (
            [name for name, tensor in palettized.items() if tensor.lut_scale is not None],
            "palettize with a float16 LUT",
        ),
    }
    for what, (names, remedy) in needs.items():
        if names:
            count = f"{len(names)} weights have" if len(names) > 1 else f"{names[0]} has"
            raise ConversionError(
                f"{source} needs iOS18: {count} {what}, which {target} cannot hold. Use --target iOS18, or {remedy}."
            )
