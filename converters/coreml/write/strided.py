"""coremltools' cast to float16 for constants that repeat one column, without writing the repetition out.

The pass that lowers a program to float16 looks for values beyond its range, with index arrays of sixteen bytes a
weight, and casts each constant into memory of its own: many gigabytes for an embedding. What is repeated through a
stride of zero (see `standins`) needs neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["lean_casts"]

_HALF_MAX = 65504.0
_INFINITE = 1e38  # from here on coremltools takes a value for infinity, which float16 holds


def _once(value: NDArray[Any]) -> NDArray[Any]:
    """A view of what an array repeats, each repeated axis of length one."""
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.strides)]


@contextlib.contextmanager
def lean_casts() -> Iterator[None]:
    """Replace both for the time of a conversion; other constants are treated as before."""
    from coremltools.converters.mil.mil.ops.defs.iOS15.elementwise_unary import cast
    from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

    kept_value, kept_overflow = (
        cast.__dict__["get_cast_value"],
        FP16ComputePrecision.__dict__["fp16_overflow"],
    )

    def cast_value(cls: Any, variable: Any, dtype: str) -> Any:
        value = variable.val
        if not isinstance(value, np.ndarray) or 0 not in value.strides or value.size < 2:
            return kept_value.__func__(cls, variable, dtype)
        from coremltools.converters.mil.mil.types.type_mapping import string_to_nptype

        return np.broadcast_to(_once(value).astype(string_to_nptype(dtype)), value.shape)

    def overflows(op: Any) -> bool:
        for given in op.inputs.values():
            for variable in given if isinstance(given, (list, tuple)) else [given]:
                constant = variable.op is not None and variable.op.op_type == "const"
                if constant and variable.is_tensor_or_scalar_of(dtype="fp32"):
                    sizes = np.abs(_once(np.asarray(variable.op.val.val)))
                    if bool(((sizes > _HALF_MAX) & (sizes < _INFINITE)).any()):
                        return True
        return False

    try:
        cast.get_cast_value = classmethod(cast_value)
        FP16ComputePrecision.fp16_overflow = staticmethod(overflows)
        yield
    finally:
        cast.get_cast_value = kept_value
        FP16ComputePrecision.fp16_overflow = kept_overflow
