"""One layer of a model's stack, as a function of its hidden states alone."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LayerBlock"]


class LayerBlock:
    """A float32 twin of a layer, with the other arguments of its call.

    Attributes:
        module: the twin; nothing in it requires gradients, and it has none of the layer's hooks.
        device: where it computes.
    """

    def __init__(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        named: Mapping[str, Any],
        *,
        windows: int,
        device: torch.device,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy a layer.

        Args:
            layer: as the model holds it, in any float dtype.
            args: of its call, behind the hidden states.
            named: arguments of its call by name.
            windows: of that call: arguments of as many rows are cut like the hidden states.
            device: where to compute.
            values: {parameter name in the layer: values}, where the layer itself has none at the moment.
        """
        self.device = device
        replaced = layer.__dict__.pop("forward", None)  # which may know the whole model
        try:
            self.module = copy.deepcopy(layer)
        finally:
            if replaced is not None:
                layer.forward = replaced
        for inner, tensor in (values or {}).items():
            owner, _, attribute = inner.rpartition(".")
            self.module.get_submodule(owner)._parameters[attribute] = nn.Parameter(
                tensor, requires_grad=False
            )
        for module in self.module.modules():
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        self.module.float().to(device).eval().requires_grad_(False)
        self._windows = windows
        self._args = [self._placed(each) for each in args]
        self._named = {name: self._placed(each) for name, each in named.items()}

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """What the layer makes of hidden states.

        Args:
            hidden: float32 [windows, context, width] of some windows; computed on `device`.
            rows: which windows these are, int64 [windows] on the CPU.

        Returns:
            Of the same shape.
        """
        args = [self._cut(each, rows) for each in self._args]
        named = {name: self._cut(each, rows) for name, each in self._named.items()}
        found = self.module(hidden.to(self.device, torch.float32), *args, **named)
        output: Tensor = found if isinstance(found, Tensor) else found[0]
        return output

    @torch.no_grad()
    def run(self, hidden: Tensor, batch: int, advance: Callable[[int], None] | None = None) -> Tensor:
        """What it makes of all windows: float32 [windows, context, width], `batch` of them at a time."""
        made = torch.empty_like(hidden, dtype=torch.float32)
        for rows in torch.split(torch.arange(len(hidden)), batch):
            made[rows] = self(hidden[rows], rows)
            if advance is not None:
                advance(len(rows))
        return made

    def _placed(self, value: Any) -> Any:
        """What all windows share goes to the device once."""
        return _mapped(value, lambda each: each if self._is_cut(each) else each.to(self.device))

    def _cut(self, value: Any, rows: Tensor) -> Any:
        return _mapped(value, lambda each: each[rows].to(self.device) if self._is_cut(each) else each)

    def _is_cut(self, tensor: Tensor) -> bool:
        return self._windows > 1 and tensor.dim() > 1 and len(tensor) == self._windows


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A structure of tensors with a function applied to each."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(each, function) for each in value)
    if isinstance(value, dict):
        return {name: _mapped(each, function) for name, each in value.items()}
    return value
