"""Traced functions become one Core AI program that holds our palettes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from converters.coreai.backend import load_converter, quiet
from converters.coreai.write.cache_ops import register_cache
from converters.coreai.write.traced_function import TracedFunction
from converters.coreai.write.weight_ops import Lowering
from edkm_export.errors import ConversionError
from edkm_export.interrupts import check_interrupt
from edkm_export.palette import PalettizedTensor

__all__ = ["convert"]


def convert(
    functions: Sequence[TracedFunction],
    palettized: Mapping[str, PalettizedTensor],
    *,
    pad_3bit: bool = False,
    source: str = "model",
) -> Any:
    """Trace and convert functions.

    Args:
        functions: of the program.
        palettized: by the name that the traces know them by; each must occur.
        pad_3bit: hold 3-bit indices as 4-bit ones.
        source: where the palettes are from, for messages.

    Returns:
        coreai.authoring.AIProgram.

    Raises:
        ConversionError: coreai-torch cannot convert a function, or a palettized weight is in none of them.
        BackendMissingError: coreai-torch is not installed.
    """
    coreai_torch = load_converter()
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    lowering = Lowering(palettized, pad_3bit=pad_3bit)
    lowering.register(converter)
    register_cache(converter)
    try:
        with torch.no_grad(), quiet():
            for function in functions:
                exported = torch.export.export(
                    function.module, function.examples, dynamic_shapes=function.dynamic_shapes
                )
                converter.add_exported_program(
                    exported.run_decompositions(coreai_torch.get_decomp_table()),
                    input_names=list(function.inputs),
                    state_names=list(function.states),
                    output_names=list(function.outputs),
                    entrypoint_name=function.name,
                )
            program = converter.to_coreai()
            for function in functions:
                if function.static_shapes is not None:
                    program.set_static_shape_config(function.name, function.static_shapes)
    except (ValueError, RuntimeError, NotImplementedError, TypeError, KeyError) as error:
        check_interrupt()  # the converter may have made this error out of it
        raise ConversionError(f"{source}: coreai-torch cannot convert this model: {error}") from error
    missed = sorted(set(palettized) - lowering.used)
    if missed:
        raise ConversionError(
            f"{source}: {len(missed)} palettized weights are not used by the converted program: "
            f"{', '.join(missed[:5])}. Report this model."
        )
    return program
