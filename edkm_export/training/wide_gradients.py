"""Gradients of a model's activations in float32, while its weights stay in 16 bits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.reference.conv1d import is_conv1d

__all__ = ["float32_gradients"]


class _WideProduct(torch.autograd.Function):
    """x times a weight that is widened where it is used, and again where the gradient passes; it gets none itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # [out, in]
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] @ ctx.weight.float(), None, None


@contextlib.contextmanager
def float32_gradients(model: nn.Module) -> Iterator[None]:
    """Run a frozen model so that its activations and their gradients are in float32.

    Memory grows by one layer's weight at a time, and by what autograd keeps of activations. Norms, biases and other
    small parameters are in float32 meanwhile.

    Args:
        model: of transformers, no parameter of which takes a gradient.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    large = {id(module.get_parameter("weight")) for module in (*linear, *embeddings)}
    kept = [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if id(parameter) not in large and parameter.dtype != torch.float32
    ]
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: output.float()) for module in embeddings
    ]
    wide = [module for module in linear if module.get_parameter("weight").dtype != torch.float32]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        for module in wide:
            module.forward = functools.partial(_product, module)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in wide:
            del module.forward
        for parameter, data in kept:
            parameter.data = data


def _product(module: Any, x: Tensor) -> Tensor:
    weight = module.weight.t() if is_conv1d(module) else module.weight
    found: Tensor = _WideProduct.apply(x, weight, module.bias)  # type: ignore[no-untyped-call]
    return found
