"""Operators of onnxruntime for the ReferenceEvaluator, in numpy (onnxruntime, docs/ContribOperators.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.backend import load_onnx
from converters.onnx.graph import CONTRIB

__all__ = ["contrib_operators"]

Array = NDArray[Any]


def contrib_operators() -> list[Any]:
    """Implementations, as classes that `onnx.reference.ReferenceEvaluator` takes as `new_ops`."""
    load_onnx()
    from onnx.reference.op_run import OpRun

    class MatMulNBits(OpRun):
        """x @ W.T with W in blocks of integers that share a scale; x is not rounded, whatever accuracy_level says."""

        op_domain = CONTRIB

        def _run(
            self,
            x: Array,
            steps: Array,
            scales: Array,
            *operands: Array | None,
            K: int = 0,  # the names of the operator's attributes
            N: int = 0,
            bits: int = 0,
            block_size: int = 0,
            accuracy_level: int = 0,
        ) -> tuple[Array]:
            if bits != 8 or any(operand is not None and operand.size for operand in operands):
                raise NotImplementedError(f"MatMulNBits with {bits} bits or more than three operands")
            centred = steps.reshape(N, -1, block_size).astype(np.float32) - 128
            weight = (centred * scales.reshape(N, -1, 1).astype(np.float32)).reshape(N, -1)[:, :K]
            return ((x.astype(np.float32) @ weight.T).astype(x.dtype),)

    return [MatMulNBits]
