"""A float model whose parameters are read one at a time, into whatever memory they are wanted in.

What `streamed_model` does while a model runs is done here while it is built: a layer can be placed on a GPU, rounded,
and cut into shares before the next one is read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.reference.weight_range import check_weight

__all__ = ["FloatWeights"]


@dataclass(frozen=True)
class FloatWeights:
    """The outline of a model, and how to read what belongs in it.

    Attributes:
        reference: what the user gave as MODEL, for messages.
        model: transformers.PreTrainedModel in eval mode; its parameters, those that are tied once, are on the meta
            device, its constants are real.
        stored: gives the values of a parameter or stored number by its key, in the form that the model holds, in any
            dtype and on any device; they are not changed.
        dtype: that they are wanted in.
        keys: {name: key}, where it is another one: tied parameters have one key.
    """

    reference: str
    model: Any
    stored: Callable[[str], Tensor]
    dtype: torch.dtype
    keys: Mapping[str, str]

    @classmethod
    def of(cls, model: Any, reference: str) -> FloatWeights:
        """Of a model that is in memory whole, for sources of which several tensors make one parameter."""
        held = {**dict(model.named_parameters()), **stored_buffers(model)}
        return cls(reference, _outline(model), lambda name: held[name].detach(), model.dtype, {})

    def read(self, key: str, device: str = "cpu") -> Tensor:
        """Values by their key, in memory of their own. They are moved as they are stored, and widened on the device."""
        values = self.stored(key)
        moved = values.to(device)
        return moved.to(self.dtype, copy=moved is values)

    def scaled(self, scales: Mapping[str, Tensor]) -> FloatWeights:
        """The same where some parameters are multiplied by factors of their last axis, {name: factors}."""
        by_key = {self.keys.get(name, name): factors for name, factors in scales.items()}

        def stored(key: str) -> Tensor:
            values = self.stored(key)
            return values if key not in by_key else values.to(self.dtype) * by_key[key].to(values.device)

        return dataclasses.replace(self, stored=stored)

    def outline(self, device: str) -> Any:
        """A fresh model without weights; its constants and stored numbers are on the device."""
        model = _outline(self.model)
        stored = stored_buffers(model)
        for name, buffer in stored.items():
            buffer.copy_(self._values(name))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        return model

    def fill(self, model: Any, within: nn.Module, device: str) -> None:
        """Give those parameters of a part of an outline values that have none; tied ones stay one.

        Args:
            model: from `outline`, or what became of it.
            within: the part, or all of it.
            device: where they go.

        Raises:
            InputError: a weight holds NaN, infinity, or what float16 cannot hold.
        """
        inside = {id(module) for module in within.modules()}
        users: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in model.named_modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    name = f"{path}.{attribute}" if path else attribute
                    users.setdefault(id(parameter), []).append((name, module, attribute))
        for places in users.values():
            if any(id(module) in inside for _, module, _ in places):
                name = places[0][0]
                values = self._values(name, device)
                check_weight(name, values, self.reference)
                made = nn.Parameter(values, requires_grad=False)
                for _, module, attribute in places:
                    module._parameters[attribute] = made

    def load(self, device: str) -> Any:
        """The whole model on a device."""
        model = self.outline(device)
        self.fill(model, model, device)
        return model

    def held(self, module: str, *, turned: bool = False) -> Tensor:
        """The weight of a layer on the CPU, as checkpoints hold it: [out, in, ...]; `turned` of a Conv1D."""
        values = self._values(f"{module}.weight")
        return values.t().contiguous() if turned else values

    def _values(self, name: str, device: str = "cpu") -> Tensor:
        return self.read(self.keys.get(name, name), device)


def _outline(model: Any) -> Any:
    """A copy of a model with its parameters on the meta device, tied ones tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    return copy.deepcopy(model, memo)
