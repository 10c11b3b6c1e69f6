"""Graph pass that puts our lookup tables and indices into a Core ML program as they are.

coremltools' own torch route drops the indices and searches for them again in the dense weight; here each dense
constant is swapped for `constexpr_lut_to_dense` built from the indices that training learned.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from coremltools.converters.mil.frontend._utils import _construct_constexpr_lut_op
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import register_pass
from torch import Tensor

from edkm_export.errors import ConversionError
from edkm_export.palette import PalettizedTensor

__all__ = ["PASS_NAME", "Substitution", "program_names", "substituting"]

PASS_NAME = "edkm_export::palettize_constants"
_SMALLEST_SHARED = 10  # elements; smaller constants are written inline
_ROWS = 1024  # compared at a time, to bound the temporaries
_HALF_SUFFIX = "_to_fp16"  # appended by the pass that lowers constants to float16


def program_names(parameters: Iterable[str]) -> dict[str, str]:
    """{parameter: a name for it that a Core ML program can hold}: ASCII identifiers, each once."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for parameter in parameters:
        plain = re.sub(r"[^A-Za-z0-9_]", "_", parameter)
        base = plain if re.match(r"[A-Za-z_]", plain) else f"p_{plain}"
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        names[parameter] = name
    return names


@dataclass
class Substitution:
    """What the pass is to put in, and what it did.

    Attributes:
        palettized: by parameter name.
        dense: the other parameters, by name; they are only looked up, to name them in the package.
        program: {parameter: its name in the program}.
        stand_ins: {parameter: what was traced in its place}; without one, its decoded value was.
        consumed: palettized parameters whose constant was found and swapped.
        names: {name in the program: parameter name}, palettized and dense.
    """

    palettized: Mapping[str, PalettizedTensor]
    dense: Mapping[str, Tensor]
    program: Mapping[str, str]
    stand_ins: Mapping[str, Tensor] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)


_ACTIVE: ContextVar[Substitution | None] = ContextVar("substitution", default=None)


@contextlib.contextmanager
def substituting(substitution: Substitution) -> Iterator[None]:
    """Make a substitution the one that the pass applies (passes are classes that coremltools instantiates)."""
    token = _ACTIVE.set(substitution)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@register_pass(namespace="edkm_export", override=True)
class palettize_constants(AbstractGraphPass):  # type: ignore[misc]
    """Swap each constant that holds a palettized parameter for its LUT and indices. Must run last."""

    def apply(self, prog: Any) -> None:
        """Visit every function of the program."""
        substitution = _ACTIVE.get()
        assert substitution is not None, "the pass runs inside `substituting` only"
        for function in prog.functions.values():
            _visit(function, substitution)


@block_context_manager  # type: ignore[untyped-decorator]
def _visit(block: Any, substitution: Substitution) -> None:
    shared: dict[tuple[Any, ...], Any] = {}
    for op in list(block.operations):
        if op.op_type != "const":
            continue
        constant = op.outputs[0]
        parameter = constant.name.removesuffix(_HALF_SUFFIX)
        if parameter in substitution.palettized:
            tensor = substitution.palettized[parameter]
            _check_same_values(op, tensor, substitution.stand_ins.get(parameter))
            swapped = _build(tensor, op, substitution.program[parameter])
            block.replace_uses_of_var_after_op(
                anchor_op=op, old_var=constant, new_var=swapped, force_replace=True
            )
            if not constant.child_ops and constant not in block.outputs:
                block.remove_ops([op])
            substitution.consumed.add(parameter)
            substitution.names[swapped.name] = parameter
        elif parameter in substitution.dense:
            constant.name = substitution.program[parameter]
            substitution.names[constant.name] = parameter
        elif np.size(constant.val) >= _SMALLEST_SHARED:
            # Every linear layer without a bias gets zeros of its own; one copy of each size is enough.
            key = (constant.dtype, constant.shape, np.asarray(constant.val).tobytes())
            if key in shared:
                block.replace_uses_of_var_after_op(anchor_op=op, old_var=constant, new_var=shared[key])
                block.remove_ops([op])
            else:
                shared[key] = constant


def _check_same_values(op: Any, tensor: PalettizedTensor, stand_in: Tensor | None) -> None:
    """A constant that another pass folded into something else must not be replaced by the original weight."""
    value = np.asarray(op.outputs[0].val)
    traced = (tensor.decode() if stand_in is None else stand_in).numpy()
    if value.shape != traced.shape or not all(
        np.array_equal(
            value[start : start + _ROWS].astype(np.float16), traced[start : start + _ROWS].astype(np.float16)
        )
        for start in range(0, value.shape[0], _ROWS)
    ):
        raise ConversionError(
            f"{tensor.name}: another conversion pass changed this weight (shape {list(value.shape)}, expected "
            f"{list(traced.shape)}), so its LUT would not be exact. Report this model."
        )


def _build(tensor: PalettizedTensor, op: Any, name: str) -> Any:
    """The operations that decode a palettized tensor, before `op`."""
    dtype = types.nptype_from_builtin(op.outputs[0].dtype)
    kernel = tensor.shape[2:]
    indices = tensor.unpack_indices().numpy().reshape(tensor.shape[0] // tensor.dim, *tensor.shape[1:])
    groups_out, groups_in = tensor.groups
    kernel_size = int(np.prod(kernel)) if kernel else 1
    if groups_in > 1 and (tensor.matrix_shape[1] // groups_in) % kernel_size:
        raise ConversionError(
            f"{tensor.name}: {groups_in} input groups split a convolution kernel; use whole channels."
        )
    leading = (groups_out, groups_in, *(1 for _ in kernel))
    vector_axis = 0 if tensor.dim > 1 else None
    lut = tensor.lut.numpy().reshape(*leading, 1 << tensor.n_bits, tensor.dim)
    if tensor.lut_scale is None:
        return _construct_constexpr_lut_op(indices, lut.astype(dtype), vector_axis, name=name, before_op=op)
    # Scale first, then look up: the order that runtimes before iOS 26 fuse.
    scale = tensor.lut_scale.numpy().reshape(*leading, 1, 1).astype(dtype)
    scaled = mb.constexpr_blockwise_shift_scale(data=lut, scale=scale, name=f"{name}_lut", before_op=op)
    indices = indices.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{tensor.n_bits}")))
    arguments: dict[str, Any] = {} if vector_axis is None else {"vector_axis": vector_axis}
    return mb.constexpr_lut_to_dense(indices=indices, lut=scaled, name=name, before_op=op, **arguments)
