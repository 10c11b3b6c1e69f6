"""Palettizes linear layers in the order in which a model calls them, each on what the ones before it make.

All windows go through the model in one call. The first time that a linear layer is called, the Hessian of its inputs
is computed, its weight is palettized, and its output is that of the palettized weight: what comes later sees the errors
of what came earlier, and makes up for them as far as it can. No layer is run twice, and nothing is assumed of the
structure of the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.calibration import check_vocabulary, float32_activations, run_body
from edkm_export.compensated_weight import makes_up, palettize_compensated
from edkm_export.errors import InputError
from edkm_export.memory import return_freed_memory
from edkm_export.palette import PalettizedTensor, all_finite
from edkm_export.recipe import Rule
from edkm_export.reference.conv1d import held_weight, is_conv1d
from edkm_export.reference.streamed_model import device_of

__all__ = ["Compensation", "Propagation", "windows_at_once"]

_VALUES = (
    1 << 25
)  # of the widest input, all windows together: 128 MiB in float32, of which a few live at a time


def windows_at_once(model: nn.Module, windows: Tensor) -> Tensor:
    """The first windows, as many as may go through a model in one call to bound its memory; one at least.

    Args:
        model: any, with linear layers.
        windows: int64 [windows, context].
    """
    widest = max((_width(layer) for layer in _linear_layers(model).values()), default=1)
    return windows[: max(1, _VALUES // (widest * windows.shape[1]))]


class Compensation:
    """Linear layers that are palettized when they are first called, and compute with their palettes from then on.

    Attributes:
        palettized: {module name: what became of its weight}.
        energy: {module name: float32 [in]} mean square of the inputs of layers that are left to the caller: of those
            that `compensated_weight.makes_up` says no to.
        dense: {parameter name: values} of others that changed: none do.
    """

    dense: Mapping[str, Tensor] = {}

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rules: Mapping[str, Rule],
        *,
        consume: bool = False,
        source: str = "model",
        advance: Callable[[str, int], None] | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            layers: by module name; each has a rule.
            rules: by module name.
            consume: free each weight when it is done; otherwise the layers are left as they are.
            source: name of the model, for messages.
            advance: called with a module's name and its number of weights when it is done.
        """
        self._rules, self._consume = rules, consume
        self._source, self._advance = source, advance
        self._layers = {name: layer for name, layer in layers.items() if makes_up(rules[name], _width(layer))}
        self._others = {name: layer for name, layer in layers.items() if name not in self._layers}
        self._inputs: Tensor | None = None  # that the Hessian is of: layers side by side share it
        self._hessian: Tensor | None = None
        self.palettized: dict[str, PalettizedTensor] = {}
        self.energy: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Layers that are palettized have a forward of ours; from others, what they are given is recorded."""
        replaced: list[tuple[nn.Module, Any]] = []
        hooks = []
        try:
            for name, layer in self._layers.items():
                replaced.append((layer, layer.__dict__.get("forward")))
                layer.forward = functools.partial(self._forward, name, layer)
                if self._consume:  # after the hook that puts the narrow weight back
                    hooks.append(layer.register_forward_hook(_release))
            for name, layer in self._others.items():
                hooks.append(
                    layer.register_forward_pre_hook(
                        lambda _layer, args, name=name: self._record(name, args[0])
                    )
                )
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, own in replaced:
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own
            self._inputs = self._hessian = None

    def _forward(self, name: str, layer: nn.Module, inputs: Tensor) -> Tensor:
        """What the palettized layer makes of inputs [..., in]; the first call palettizes it."""
        if name not in self.palettized:
            weight = held_weight(layer)
            parameter = f"{name}.weight"
            if not all_finite(weight):
                raise InputError(f"{self._source}: {parameter} holds NaN or infinity; the model is broken.")
            hessian = self._hessian_of(name, inputs)
            samples = inputs.numel() // inputs.shape[-1]
            self.palettized[name] = palettize_compensated(
                parameter, weight, self._rules[name], hessian, samples=samples
            )
            if self._advance is not None:
                self._advance(name, weight.numel())
        decoded = self.palettized[name].decode().to(inputs.device, inputs.dtype)
        bias: Any = layer.bias
        return nn.functional.linear(inputs, decoded, bias)

    def _hessian_of(self, name: str, inputs: Tensor) -> Tensor:
        if self._hessian is None or inputs is not self._inputs:
            self._inputs = self._hessian = None
            rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
            hessian = rows.t() @ rows / len(rows)
            _require_finite(name, hessian)
            self._inputs, self._hessian = inputs, hessian
        return self._hessian

    def _record(self, name: str, inputs: Tensor) -> None:
        energy = inputs.detach().float().reshape(-1, inputs.shape[-1]).square().mean(0).cpu()
        _require_finite(name, energy)
        self.energy[name] = energy


class Propagation(Compensation):
    """Linear layers of a language model that are palettized while it runs; the energy of its head's inputs, too."""

    def __init__(
        self,
        model: Any,
        rules: Mapping[str, Rule],
        *,
        consume: bool = False,
        source: str = "model",
        advance: Callable[[str, int], None] | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            model: a causal language model of transformers or a `SentenceModel`, in eval mode, in any float dtype.
            rules: by module name; layers without one stay as they are.
            consume: as of `Compensation`, like the following.
            source: name of the model.
            advance: called when a module is done.
        """
        self._model, self._head = model, model.get_output_embeddings()
        outer = {id(_parameter(layer)) for layer in (model.get_input_embeddings(), self._head) if layer}
        inner = {
            name: layer
            for name, layer in _linear_layers(model).items()
            if name in rules and id(_parameter(layer)) not in outer
        }
        super().__init__(inner, rules, consume=consume, source=source, advance=advance)

    @torch.no_grad()
    def run(self, windows: Tensor) -> None:
        """Call the model.

        Args:
            windows: int64 [windows, context].

        Raises:
            InputError: a token is beyond the vocabulary, or a weight or an activation is not finite.
        """
        check_vocabulary(self._model, windows)
        try:
            with float32_activations(self._model), self.watching():
                ids = windows.to(device_of(self._model))
                hidden = run_body(self._model, ids)
        finally:
            return_freed_memory()
        name = next((name for name, module in self._model.named_modules() if module is self._head), None)
        if name is not None:
            self._record(name, hidden)


def _require_finite(name: str, values: Tensor) -> None:
    if not all_finite(values):
        raise InputError(f"{name}: its input is not finite on the calibration text; the model is broken.")


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }


def _parameter(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight")


def _width(layer: nn.Module) -> int:
    """Inputs of a linear layer."""
    return _parameter(layer).shape[0 if is_conv1d(layer) else 1]


def _release(layer: nn.Module, _args: Any, _output: Any) -> None:
    parameter = _parameter(layer)
    parameter.data = torch.empty(0, dtype=parameter.dtype)
