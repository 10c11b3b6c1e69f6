"""Linear layers that read the same input, one by one or fused into one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["add_projections", "linears", "project"]


def add_projections(
    module: nn.Module, names: Sequence[str], inputs: int, sizes: Sequence[int], bias: bool
) -> None:
    """Give a module a linear layer for each name, or one for all sizes when there is one name.

    Args:
        module: which gets them.
        names: of the layers.
        inputs: channels of the input.
        sizes: channels of each output.
        bias: the layers have one.
    """
    for name, size in zip(names, sizes if len(names) > 1 else [sum(sizes)], strict=True):
        module.add_module(name, nn.Linear(inputs, size, bias=bias))


def project(module: nn.Module, names: Sequence[str], sizes: Sequence[int], x: Tensor) -> Sequence[Tensor]:
    """Apply them: x [..., inputs] -> [..., size] for each size."""
    outputs = linears(x, [module.get_submodule(name) for name in names])
    if len(outputs) == len(sizes):
        return outputs
    parts: Sequence[Tensor] = outputs[0].split(list(sizes), dim=-1)  # type: ignore[no-untyped-call]
    return parts


def linears(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Apply linear layers to one input; what is no tensor may do it in one go (PyTorch's override protocol).

    Args:
        x: [..., inputs].
        layers: one or more.

    Returns:
        [..., outputs] of each.
    """
    if has_torch_function_unary(x):
        made: Sequence[Tensor] = handle_torch_function(linears, (x,), x, layers)
        return made
    return [layer(x) for layer in layers]
