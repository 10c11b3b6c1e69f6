"""Operators of onnxruntime for the ReferenceEvaluator, in numpy (onnxruntime, docs/ContribOperators.md).

Held are the forms that the exporter writes. Others raise, which `executors.ReferenceRuntime` reports as a PackageError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.backend import load_onnx
from converters.onnx.read.graph import CONTRIB

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
            entries: Array,
            scales: Array,
            *operands: Array | None,
            K: int = 0,  # the names of the operator's attributes
            N: int = 0,
            bits: int = 0,
            block_size: int = 0,
            accuracy_level: int = 0,
        ) -> tuple[Array]:
            if bits not in (4, 8) or any(operand is not None and operand.size for operand in operands):
                raise NotImplementedError(f"MatMulNBits with {bits} bits or more than three operands")
            if bits == 4:  # the low bits first
                entries = np.stack([entries & 15, entries >> 4], axis=-1)
            centred = entries.reshape(N, -1, block_size).astype(np.float32) - (1 << (bits - 1))
            weight = (centred * scales.reshape(N, -1, 1).astype(np.float32)).reshape(N, -1)[:, :K]
            return ((x.astype(np.float32) @ weight.T).astype(x.dtype),)

    class RotaryEmbedding(OpRun):
        """Channel i of a head turns together with channel i + rotary_dim / 2.

        x [batch, heads, new, head_dim], or [batch, new, heads * head_dim].
        """

        op_domain = CONTRIB

        def _run(
            self,
            x: Array,
            position_ids: Array,
            cos: Array,
            sin: Array,
            interleaved: int = 0,
            num_heads: int = 0,
            rotary_embedding_dim: int = 0,
            is_packed_batching: int = 0,
            scale: float = 1.0,
        ) -> tuple[Array]:
            if x.ndim not in (3, 4) or interleaved or is_packed_batching or scale != 1:
                raise NotImplementedError("RotaryEmbedding in another form than the exporter writes")
            half, shape, axis = cos.shape[1], x.shape, 1
            if x.ndim == 3:
                heads, axis = num_heads or x.shape[2] // (2 * half), 2
                x = x.reshape(*x.shape[:2], heads, -1)
            c, s = (np.expand_dims(table[position_ids], axis) for table in (cos, sin))
            first, second, kept = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            turned = (first * c - second * s, second * c + first * s, kept)
            return (np.concatenate(turned, axis=-1).astype(x.dtype).reshape(shape),)

    class SkipSimplifiedLayerNormalization(OpRun):
        """Root mean square norm of a sum, and the sum as the fourth result."""

        op_domain = CONTRIB

        def _run(
            self, x: Array, skip: Array, gamma: Array, *bias: Array | None, epsilon: float = 1e-5
        ) -> tuple[Array, Array, Array, Array]:
            if any(operand is not None and operand.size for operand in bias):
                raise NotImplementedError("SkipSimplifiedLayerNormalization with a bias")
            total = x + skip
            wide = total.astype(np.float32)
            normal = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + np.float32(epsilon))
            training = np.empty(0, np.float32)  # two results that only training would take
            return (normal * gamma).astype(x.dtype), training, training, total

    return [MatMulNBits, RotaryEmbedding, SkipSimplifiedLayerNormalization]
