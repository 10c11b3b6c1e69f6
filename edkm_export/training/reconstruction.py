"""Palettizes a language model layer by layer of its stack, each fitted to what the float layer makes.

All windows go through the model in one call, as in `propagation`, but whole decoder layers are taken over. Each gets
two streams of hidden states: what the float layers before it make, and what the palettized ones make. Its linear layers
are first palettized so that they make up for their errors on the latter; then indices, LUTs and norms are fitted to the
output of the float layer on the former. Errors of earlier layers are made up for as far as a layer can. One layer is in
the optimizer at a time, and nothing is learned from labels or logits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.calibration import check_vocabulary, float32_activations, run_body
from edkm_export.errors import InputError
from edkm_export.memory import return_freed_memory
from edkm_export.palette import PalettizedTensor, all_finite
from edkm_export.palettization import compact, in_place, palettize_weight
from edkm_export.propagation import Compensation, windows_at_once
from edkm_export.recipe import Rule
from edkm_export.reference.conv1d import is_conv1d
from edkm_export.reference.streamed_model import device_of, is_layer, release, streamed_weights
from edkm_export.training.block_fit import BlockData, FitSettings, fit_block
from edkm_export.training.layer_block import LayerBlock
from edkm_export.training.output_importance import output_importance
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import clusters_of, insert_palettes

__all__ = ["Fitted", "Reconstruction", "layers_of", "windows_in_streams"]

_VALUES = 1 << 26  # hidden states of a stream: 256 MiB in float32, of which three live at a time
_HELD_OUT = 16  # one window of so many shows whether fitting helped


@dataclass(frozen=True)
class Fitted:
    """How well a layer was fitted.

    Attributes:
        name: of the layer.
        before, after: the loss on windows that were not trained on, with compensation alone and after fitting.
    """

    name: str
    before: float
    after: float


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The stack of decoder layers by name, in order."""
    return {name: module for name, module in model.named_modules() if is_layer(name)}


def windows_in_streams(model: Any, windows: Tensor) -> Tensor:
    """The first windows, as many as the streams of hidden states have room for; two at least."""
    width = model.get_input_embeddings().weight.shape[1]
    return windows[: max(2, _VALUES // (width * windows.shape[1]))]


class Reconstruction:
    """Decoder layers of a language model that are palettized and fitted while it runs.

    Attributes:
        palettized: {module name: what became of its weight}.
        energy: {module name: float32 [in]} mean square of the output head's inputs.
        dense: {parameter name: values} of norms and biases that were fitted, too.
        fitted: how well, layer by layer.
    """

    def __init__(
        self,
        model: Any,
        rules: Mapping[str, Rule],
        settings: FitSettings,
        *,
        device: torch.device | str = "cpu",
        consume: bool = False,
        source: str = "model",
        advance: Callable[[str, int], None] | None = None,
        ends: Mapping[str, PalettizedTensor] | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            model: a causal language model of transformers, in eval mode, in any float dtype.
            rules: by module name.
            settings: of the fit.
            device: where layers are fitted, one at a time; the model stays where it is.
            consume: free each weight when it is done; otherwise the model is left as it is.
            source: name of the model, for messages.
            advance: called with a module's name and its number of weights when it is done.
            ends: {module name: palette} of an embedding and an output head that are palettized already. The layers are
                fitted to what the float embedding leads to, on what the palettized one gives them.

        Raises:
            InputError: its layers take more than hidden states of the layer before them.
        """
        self._model, self._rules, self._settings = model, rules, settings
        self._device = self._place = torch.device(device)
        self._importance: dict[str, Tensor] = {}
        self._consume = consume and streamed_weights(model) is None
        self._source, self._advance = source, advance
        self._layers = layers_of(model)
        check_layers(self._layers, source)
        names = list(self._layers)
        self._first, self._last = names[0], names[-1]
        self._ends = dict(ends or {})
        self._stream: Tensor | None = None  # what the float layers make
        self.palettized: dict[str, PalettizedTensor] = dict(self._ends)
        self.energy: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self.fitted: list[Fitted] = []

    @torch.no_grad()
    def run(self, windows: Tensor) -> None:
        """Call the model.

        Args:
            windows: int64 [windows, context]; two at least.

        Raises:
            InputError: a token is beyond the vocabulary, or a weight or an activation is not finite.
        """
        check_vocabulary(self._model, windows)
        settings = self._settings
        if settings.weighs in ("full", "diagonal"):
            with _reproducible(self._device):
                self._importance = output_importance(
                    self._model,
                    windows,
                    self._layers,
                    kind=settings.weighs,
                    device=self._device,
                    seed=settings.seed,
                    batch=settings.batch,
                )
        try:
            if self._ends:
                self._stream = self._first_states(windows).to(self._device, torch.float32)
            with (
                in_place(self._model, self._ends),
                float32_activations(self._model),
                self._taking_over(),
                _reproducible(self._device),
            ):
                hidden = run_body(self._model, windows.to(device_of(self._model)))
        finally:
            self._stream = None
            return_freed_memory()
        head = self._model.get_output_embeddings()
        name = next((name for name, module in self._model.named_modules() if module is head), None)
        if name is not None:
            self.energy[name] = hidden.float().flatten(0, -2).square().mean(0).cpu()
            _require_finite(name, self.energy[name])

    def _first_states(self, windows: Tensor) -> Tensor:
        """What the first layer is given by the float embedding, [windows, context, width]."""
        found: list[Tensor] = []

        def stop(hidden: Tensor, *_args: Any, **_named: Any) -> Tensor:
            found.append(hidden)
            raise _Reached

        layer = self._layers[self._first]
        own = layer.__dict__.get("forward")
        layer.forward = stop
        try:
            with float32_activations(self._model), contextlib.suppress(_Reached):
                run_body(self._model, windows.to(device_of(self._model)))
        finally:
            _restore(layer, own)
        return found[0]

    @contextlib.contextmanager
    def _taking_over(self) -> Iterator[None]:
        """Decoder layers have a forward of ours."""
        replaced = [(layer, layer.__dict__.get("forward")) for layer in self._layers.values()]
        try:
            for name, layer in self._layers.items():
                layer.forward = functools.partial(self._forward, name, layer)
            yield
        finally:
            for layer, own in replaced:
                _restore(layer, own)

    def _forward(self, name: str, layer: nn.Module, hidden: Tensor, *args: Any, **named: Any) -> Tensor:
        """What the fitted layer makes of the palettized stream [windows, context, width]."""
        if name == self._first:
            self._place = hidden.device  # of the model, which takes up again what the last layer makes
        hidden = hidden.to(self._device, torch.float32)
        count, batch = len(hidden), self._settings.batch
        block = LayerBlock(layer, args, named, windows=count, device=self._device)
        self._check_weights(name, block.module)
        targets = block.run(hidden if self._stream is None else self._stream, batch)
        _require_finite(name, targets)
        self._stream = targets
        palettes = self._start(name, block, hidden)
        insert_palettes(block.module, palettes, self._rules_in(name, palettes), method=ClusterMethod())
        weights = self._importance.get(name)
        data = BlockData(
            hidden,
            targets,
            None if weights is None else weights.to(self._device),
            relative=self._settings.weighs != "none",
            held_out=max(1, count // _HELD_OUT),
        )
        self.fitted.append(Fitted(name, *fit_block(block, data, self._settings)))
        made = block.run(hidden, batch)
        self._take(name, layer, block)
        if name == self._last:
            self._stream = None
        return made.to(self._place) if name == self._last else made

    def _start(self, name: str, block: LayerBlock, hidden: Tensor) -> dict[str, PalettizedTensor]:
        """{name in the layer: palette}, with errors made up for inside of the layer."""
        linear = {
            f"{name}.{inner}": module
            for inner, module in block.module.named_modules()
            if (isinstance(module, nn.Linear) or is_conv1d(module)) and f"{name}.{inner}" in self._rules
        }
        some = windows_at_once(block.module, hidden)
        compensation = Compensation(linear, self._rules, source=self._source)
        with compensation.watching():
            block(some, torch.arange(len(some)))
        found = {}
        for full, module in linear.items():
            palette = compensation.palettized.get(full)
            if palette is None:
                weight = module.get_parameter("weight")
                weight = weight.t() if is_conv1d(module) else weight
                palette = palettize_weight(
                    f"{full}.weight", weight, self._rules[full], importance=compensation.energy.get(full)
                )
            found[full.removeprefix(f"{name}.")] = palette
        return found

    def _rules_in(self, name: str, palettes: Mapping[str, PalettizedTensor]) -> dict[str, Rule]:
        return {inner: self._rules[f"{name}.{inner}"] for inner in palettes}

    def _take(self, name: str, layer: nn.Module, block: LayerBlock) -> None:
        """Keep what became of a layer."""
        for inner, clusters in clusters_of(block.module).items():
            full = f"{name}.{inner}"
            self.palettized[full] = clusters.export(f"{full}.weight")
            if self._consume:
                release(self._model, f"{full}.weight")
            if self._advance is not None:
                self._advance(full, clusters.weight.numel())
        own = dict(layer.named_parameters())
        for inner, parameter in block.module.named_parameters():
            if ".clusters." not in f".{inner}" and not torch.equal(parameter.cpu(), own[inner].float().cpu()):
                self.dense[f"{name}.{inner}"] = compact(parameter)

    def _check_weights(self, name: str, module: nn.Module) -> None:
        for inner, parameter in module.named_parameters():
            if not all_finite(parameter):
                raise InputError(
                    f"{self._source}: {name}.{inner} holds NaN or infinity; the model is broken."
                )


class _Reached(Exception):
    """The first layer was called."""


def _restore(layer: nn.Module, own: Callable[..., Any] | None) -> None:
    """Give a layer the forward that it had; None: that of its class."""
    if own is None:
        del layer.forward
    else:
        layer.forward = own


def check_layers(layers: Mapping[str, nn.Module], source: str) -> None:
    """Refuse a model whose decoder layers cannot be fitted one by one.

    Raises:
        InputError: it has none, or they take other things than hidden states from the layers before them.
    """
    for name, layer in layers.items():
        if "per_layer_input" in inspect.signature(type(layer).forward).parameters:
            raise InputError(
                f"{source}: {name} takes more than what the layer before it makes, so it cannot be fitted by itself; "
                "leave --effort high out."
            )
    if not layers:
        raise InputError(f"{source}: has no stack of layers to fit one by one; leave --effort high out.")


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """On CUDA, products in TF32, which holds each entry of a float16 LUT, and attention whose sums have an order."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _require_finite(name: str, values: Tensor) -> None:
    if not all_finite(values):
        raise InputError(f"{name}: its output is not finite on the calibration text; the model is broken.")
