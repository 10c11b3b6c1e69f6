"""Linear layers that read the same input, one by one or fused into one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["add_projections", "project"]


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
    outputs = [module.get_submodule(name)(x) for name in names]
    return outputs if len(outputs) == len(sizes) else outputs[0].split(list(sizes), dim=-1)
