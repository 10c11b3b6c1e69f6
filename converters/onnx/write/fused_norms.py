"""Norms of a decoder, and other statistics of channels, as nodes.

The decoder's own are written for float16; these compute in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from converters.onnx.write.builder import CONTRIB
from converters.onnx.write.tracing import Tracer, Value
from edkm_export.decoder.magnitudes import SameMagnitude, TopGates
from edkm_export.decoder.norms import LayerNorm, PlainRMSNorm, RMSNorm, UnitNorm

__all__ = ["replace_norm"]


def replace_norm(module: torch.nn.Module, tracer: Tracer) -> None:
    """Let a module of a decoder call one of these, if it is a norm or another statistic."""
    if isinstance(module, RMSNorm):
        fused = tracer.weights.contrib and tracer.dtype == torch.float32 and module.scale == 1
        form = _SkipRMSNorm if fused else _RMSNorm
        module.forward = form(module, tracer)  # type: ignore[method-assign, assignment]
    elif isinstance(module, PlainRMSNorm):
        module.forward = _PlainRMSNorm(module, tracer)  # type: ignore[method-assign, assignment]
    elif isinstance(module, LayerNorm):
        module.forward = _LayerNorm(module, tracer)  # type: ignore[method-assign, assignment]
    elif isinstance(module, UnitNorm):
        module.forward = _unit_norm  # type: ignore[method-assign, assignment]

    elif isinstance(module, SameMagnitude):
        module.forward = _SameMagnitude(module, tracer)  # type: ignore[method-assign, assignment]
    elif isinstance(module, TopGates):
        module.forward = _TopGates(module, tracer)  # type: ignore[method-assign, assignment]


def _unit_norm(x: Value) -> Value:
    """Division by the length: x [..., size] -> [..., size]."""
    wide = x.to(torch.float32)
    axes = x.tracer.graph.integers(-1)
    shape = (*x.shape[:-1], 1)
    length = x.tracer.emit("ReduceL2", wide.name, axes, shape=shape, dtype=torch.float32, keepdims=1)
    return (wide / length.clamp(min=_SHORTEST)).to(x.tracer.dtype)


_SHORTEST = 1e-12  # as torch.nn.functional.normalize has it


class _Statistic:
    """What is computed of the channels of a vector.

    Args:
        module: of the decoder.
        tracer: of the graph.
    """

    def __init__(self, module: Any, tracer: Tracer) -> None:
        self._module, self._tracer = module, tracer

    def _mean(self, x: Value) -> Value:
        axes = self._tracer.graph.integers(-1)
        return self._tracer.emit(
            "ReduceMean", x.name, axes, shape=(*x.shape[:-1], 1), dtype=x.dtype, keepdims=1
        )

    def _power(self, x: Value) -> Value:
        two = self._tracer.constant(2.0, x.dtype)
        return self._tracer.emit("Pow", x.name, two, shape=x.shape, dtype=x.dtype)


class _SameMagnitude(_Statistic):
    """x [..., size] with the root mean square of another value."""

    def __call__(self, x: Value, like: Value) -> Value:
        wide, wanted = x.to(torch.float32), like.to(torch.float32)
        least = float(self._module.root_least.double()) ** 2
        length = self._mean(self._power(wide)).clamp(min=least)._unary("Sqrt")
        return (wide * self._mean(self._power(wanted))._unary("Sqrt") / length).to(self._tracer.dtype)


class _TopGates(_Statistic):
    """What of x [..., size] is above its mean and so many deviations."""

    def __call__(self, x: Value) -> Value:
        wide = x.to(torch.float32)
        mean = self._mean(wide)
        deviation = self._mean(self._power(wide - mean))._unary("Sqrt")
        deviations: float = self._module.deviations
        return (wide - (mean + deviation * deviations))._unary("Relu").to(self._tracer.dtype)


class _Norm(_Statistic):
    """A norm in the plain form that runtimes fuse."""

    def __init__(self, module: Any, tracer: Tracer) -> None:
        super().__init__(module, tracer)
        self._eps = float(module.root_eps.double()) ** 2

    def _weight(self, which: str) -> Value:
        parameter = getattr(self._module, which)
        name = self._tracer.weights.vector(self._tracer.parameters[id(parameter)])
        return Value(self._tracer, name, tuple(parameter.shape), self._tracer.dtype)

    def _normalize(self, x: Value) -> Value:
        """Divide by the root mean square."""
        return x / (self._mean(self._power(x)) + self._eps)._unary("Sqrt")


class _RMSNorm(_Norm):
    """Root mean square norm: x [..., size] -> [..., size]."""

    def __call__(self, x: Value) -> Value:
        return self._normalize(x.to(torch.float32)).to(self._tracer.dtype) * self._scale()

    def _scale(self) -> Value:
        weight = self._weight("weight")
        if self._module.offset:
            weight = weight + 1.0
        if self._module.scale != 1:
            weight = weight * self._module.scale
        return weight


class _PlainRMSNorm(_Norm):
    """The same without a weight."""

    def __call__(self, x: Value) -> Value:
        return self._normalize(x.to(torch.float32)).to(self._tracer.dtype)


class _SkipRMSNorm(_RMSNorm):
    """The same, in one operator of onnxruntime with the residual sum before it."""

    def __call__(self, x: Value) -> Value:
        if x.terms is None:
            return super().__call__(x)
        graph, scale = self._tracer.graph, self._scale()
        graph.drop(x.name)  # the sum is the last output of the new node
        name = graph.unique("SkipSimplifiedLayerNormalization")
        graph.append(
            "SkipSimplifiedLayerNormalization",
            (*x.terms, scale.name),
            (name, "", "", x.name),
            domain=CONTRIB,
            epsilon=self._eps,
        )
        return Value(self._tracer, name, x.shape, x.dtype)


class _LayerNorm(_Norm):
    """Layer norm with weight, and with or without bias: x [..., size] -> [..., size]."""

    def __call__(self, x: Value) -> Value:
        wide = x.to(torch.float32)
        normal = self._normalize(wide - self._mean(wide)).to(self._tracer.dtype)
        scaled = normal * self._weight("weight")
        return scaled if self._module.bias is None else scaled + self._weight("bias")
