"""Palettes in the state dict of a model that coreai-opt has finalized for Core AI.

There a palettized weight is a parametrization (coreai-opt 0.4.0): `<module>.parametrizations.<parameter>.0.lut` and
`.indices`, for an int8 LUT also `.scale` and `.zero_point`, and an empty `.original` in the place of the weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from edkm_export.errors import CheckpointError, PaletteError
from edkm_export.palette import PalettizedTensor

__all__ = ["FAULTS", "split_finalized"]

FAULTS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What torch raises for tensors that do not fit together."""

_PART = re.compile(r"(?P<module>.*\.|)parametrizations\.(?P<parameter>[^.]+)\.(?P<part>original|0\.[a-z_]+)")
_PARTS = {"original", "0.lut", "0.indices", "0.scale", "0.zero_point"}


def split_finalized(
    state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, PalettizedTensor], dict[str, Tensor]]:
    """Take the palettes out of a state dict.

    Args:
        state: tensors by name.
        source: where it is from, for messages.

    Returns:
        Palettized weights by the name of the parameter, and everything else.

    Raises:
        CheckpointError: a palette is not whole, or cannot be held exactly.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, value in state.items():
        found = _PART.fullmatch(name)
        if found is None:
            others[name] = value
            continue
        if found["part"] not in _PARTS:
            raise CheckpointError(
                f"{source}: {name}: palettes have no such part; finalize with coreai-opt 0.4."
            )
        parts.setdefault(found["module"] + found["parameter"], {})[found["part"]] = value
    palettes = {}
    for name, held in parts.items():
        try:
            palettes[name] = _palette(name, held, source)
        except FAULTS as error:
            raise CheckpointError(f"{source}: {name}: its parts make no palette ({error}).") from error
    return palettes, others


def _palette(name: str, parts: Mapping[str, Tensor], source: str) -> PalettizedTensor:
    lut, indices = parts.get("0.lut"), parts.get("0.indices")
    if lut is None or indices is None or lut.dim() != 4 or indices.dtype != torch.uint8 or indices.dim() < 2:
        raise CheckpointError(
            f"{source}: {name}: its LUT or its indices are missing or misshapen; finalize again."
        )
    scale = parts.get("0.scale")
    if scale is not None:
        offset = parts.get("0.zero_point")
        if lut.dtype != torch.int8 or (offset is not None and bool(offset.any())):
            raise CheckpointError(
                f"{source}: {name}: its LUT is {lut.dtype} with a zero point; palettize with symmetric int8 LUTs."
            )
        if scale.numel() != lut.shape[0] * lut.shape[1]:
            raise CheckpointError(
                f"{source}: {name}: has {scale.numel()} scales for {list(lut.shape[:2])} LUTs."
            )
        scale = _half(scale.reshape(lut.shape[:2]), f"{source}: {name}: a scale")
    else:
        lut = _half(lut, f"{source}: {name}: a LUT entry")
    try:
        return PalettizedTensor.from_indices(name, lut, indices, lut_scale=scale)
    except PaletteError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _half(values: Tensor, what: str) -> Tensor:
    """As float16, which must hold them exactly."""
    half = values.half()
    wrong = half.to(values.dtype) != values
    if bool(wrong.any()):
        raise CheckpointError(
            f"{what} is {float(values[wrong][0])!r}, which float16 cannot hold exactly; train with the edkm strategy, "
            "which keeps LUTs on that grid, or in float16."
        )
    return half
