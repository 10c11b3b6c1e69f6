"""Builds small .mlpackage folders with coremltools, for the tests of the reader and the interpreter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.frontend._utils import _construct_constexpr_lut_op
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

logging.getLogger("coremltools").setLevel(logging.ERROR)

TYPES = {
    np.dtype(np.float32): types.fp32,
    np.dtype(np.float16): types.fp16,
    np.dtype(np.int32): types.int32,
}


def save_program(
    path: Path,
    inputs: Mapping[str, np.ndarray],
    body: Callable[..., Any],
    *,
    target: str = "iOS18",
) -> Path:
    """Save a program whose function takes inputs like the given arrays and returns what `body` returns.

    The graph passes are left out, so that the package holds the ops that `body` builds.
    """
    opset = getattr(ct.target, target)
    placeholders = {
        name: mb.placeholder(array.shape, dtype=TYPES[array.dtype]) for name, array in inputs.items()
    }
    program = Program()
    with Function(placeholders, opset_version=opset) as function:
        result = body(**function.inputs)
        function.set_outputs(list(result) if isinstance(result, (list, tuple)) else [result])
        program.add_function("main", function)
    return save(
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ),
        path,
    )


def save(model: Any, path: Path) -> Path:
    """Save a converted model."""
    model.save(str(path))
    return path


def convert(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[Any],
    path: Path,
    *,
    half: bool,
    target: str = "iOS18",
    states: list[Any] | None = None,
    palettes: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Trace, convert and save a torch module, with palettes for some of its parameters."""
    pipeline = ct.PassPipeline.DEFAULT
    InstallPalettes.palettes = dict(palettes or {})
    pipeline.append_pass("edkm_tests::InstallPalettes")
    extra = {"states": states} if states else {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
        model = ct.convert(
            traced,
            inputs=inputs,
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            pass_pipeline=pipeline,
            skip_model_load=True,
            **extra,
        )
    return save(model, path)


@register_pass(namespace="edkm_tests", override=True)
class InstallPalettes(AbstractGraphPass):
    """Swaps constants for palettes: {name: {indices, lut, vector_axis, scale, scale_first}}."""

    palettes: dict[str, dict[str, Any]] = {}

    def apply(self, prog: Any) -> None:
        for function in prog.functions.values():
            self._visit(function)

    @block_context_manager
    def _visit(self, block: Any) -> None:
        for op in list(block.operations):
            name = op.outputs[0].name.removesuffix("_to_fp16").replace(".", "_") if op.outputs else ""
            if op.op_type != "const" or name not in self.palettes:
                continue
            new = lookup(f"{name}_palettized", op, **self.palettes[name])
            block.replace_uses_of_var_after_op(
                anchor_op=op, old_var=op.outputs[0], new_var=new, force_replace=True
            )


def lookup(
    name: str,
    before: Any,
    *,
    indices: np.ndarray,
    lut: np.ndarray,
    vector_axis: int | None = None,
    scale: np.ndarray | None = None,
    scale_first: bool = False,
) -> Any:
    """A constexpr_lut_to_dense, with an int8 LUT scaled after the lookup or before it."""
    if scale is None:
        return _construct_constexpr_lut_op(indices, lut, vector_axis, name=name, before_op=before)
    if scale_first:
        table = mb.constexpr_blockwise_shift_scale(
            data=lut, scale=scale, name=f"{name}_lut", before_op=before
        )
        width = types.string_to_builtin(
            f"uint{lut.shape[-2].bit_length() - 1}"
        )  # left undone for a computed LUT
        codes = indices.astype(types.nptype_from_builtin(width))
        return _construct_constexpr_lut_op(codes, table, vector_axis, name=name, before_op=before)
    raw = _construct_constexpr_lut_op(indices, lut, vector_axis, name=f"{name}_raw", before_op=before)
    return mb.constexpr_blockwise_shift_scale(data=raw, scale=scale, name=name, before_op=before)
