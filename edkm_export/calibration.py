"""Activation statistics of a float model on calibration text.

The error that a changed weight makes in a layer's output grows with the mean square of the activation that
meets it, so k-means weighted by that energy minimizes output error rather than weight error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.activity import tracked
from edkm_export.errors import InputError
from edkm_export.memory import return_freed_memory
from edkm_export.reference.conv1d import is_conv1d
from edkm_export.reference.sentence_model import SentenceModel
from edkm_export.reference.streamed_model import device_of
from edkm_export.text import LEAST_TOKENS, in_windows, token_ids, token_windows
from edkm_export.token_ids import Ids, as_ids

__all__ = [
    "Batch",
    "CalibrationText",
    "check_vocabulary",
    "float32_activations",
    "input_energy",
    "module_energy",
    "run_body",
]

Batch = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments of one call of a module."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def input_energy(
    model: Any, windows: Tensor, *, advance: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Mean square of each input channel of each linear layer.

    Weights stay in 16 bits; each module widens its own to float32 while it runs, so that peak memory grows by one
    layer only and activations beyond float16 do no harm.

    Args:
        model: a causal language model of transformers, or a `SentenceModel`.
        windows: int64 [windows, context].
        advance: called after each window.

    Returns:
        {module name: float32 [in_features]}, the output head included.

    Raises:
        InputError: an activation is not finite, or a token is beyond the vocabulary.
    """
    check_vocabulary(model, windows)
    sums: dict[str, Tensor] = {}

    def record(name: str, inputs: Tensor) -> None:
        energy = inputs.detach().float().reshape(-1, inputs.shape[-1]).square().sum(0)
        sums[name] = sums[name] + energy if name in sums else energy

    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, name=name: record(name, args[0]))
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not head
    ]

    try:
        with float32_activations(model):
            for window in tracked(windows, "calibration text", "windows"):
                ids = window[None].to(device_of(model))
                hidden = run_body(model, ids)
                if head_name is not None:
                    record(head_name, hidden)
                if advance is not None:
                    advance()
    finally:
        for hook in hooks:
            hook.remove()
        return_freed_memory()
    for name, energy in sums.items():
        if not bool(torch.isfinite(energy).all()):
            raise InputError(f"{name}: its input is not finite on the calibration text; the model is broken.")
        sums[name] = energy.cpu() / windows.numel()
    return sums


@torch.no_grad()
def module_energy(
    model: nn.Module, batches: Iterable[Batch], *, advance: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Mean square of what meets each weight of linear and convolution layers, in any module.

    Args:
        model: is run in eval mode, in its own dtype, and left as it was.
        batches: arguments of its calls.
        advance: called after each batch.

    Returns:
        {module name: float32}: [in] of a linear layer; of a convolution [in * kernel], or [out, in * kernel] where
        rows meet different channels (groups, transposed). Layers that were not called are left out.

    Raises:
        InputError: the module cannot be called so, or an activation is not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def record(name: str, layer: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs = next(found for found in (*args, *named.values()) if isinstance(found, Tensor))
        values = inputs.detach().float()
        spatial = (
            len(getattr(layer, "kernel_size", ())) if isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)) else 0
        )
        values = values.movedim(-1 - spatial, -1) if spatial else values
        values = values.reshape(-1, values.shape[-1])
        sums[name] = sums.get(name, torch.zeros(())) + values.square().sum(0).cpu()
        counts[name] = counts.get(name, 0) + len(values)

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)) or is_conv1d(module)
    }
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, named, name=name: record(name, module, args, named), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for number, (args, named) in enumerate(batches):
            try:
                model(*args, **named)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                raise InputError(
                    f"{type(model).__name__} cannot be called with calibration batch {number}: "
                    f"{str(error).splitlines()[0][:300]}"
                ) from error
            if advance is not None:
                advance()
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was
    found = {}
    for name, energy in sums.items():
        if not bool(torch.isfinite(energy).all()):
            raise InputError(f"{name}: its input is not finite on the calibration data; the model is broken.")
        found[name] = _of_weights(layers[name], energy / counts[name])
    return found


def _of_weights(layer: nn.Module, energy: Tensor) -> Tensor:
    """From the energy of each input channel [in] to that of each column, or of each weight [rows, columns]."""
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return energy
    rows, columns = len(layer.weight), layer.weight[0].numel()
    if isinstance(layer, _TRANSPOSED):
        return energy[:, None].expand(rows, columns)
    kernel = columns // layer.weight.shape[1]
    by_group = energy.view(layer.groups, -1).repeat_interleave(kernel, dim=1)  # [groups, columns]
    return by_group[0] if layer.groups == 1 else by_group.repeat_interleave(rows // layer.groups, dim=0)


def run_body(model: Any, ids: Tensor) -> Tensor:
    """Call all layers of a model but its output head, whose product, a whole vocabulary wide, is not needed.

    Args:
        model: a causal language model of transformers, or a `SentenceModel`.
        ids: int64 [windows, context].

    Returns:
        The inputs of the head [windows, context, hidden]; of a `SentenceModel`, which has none, its embeddings.
    """
    if isinstance(model, SentenceModel):
        return model(ids, torch.ones_like(ids))  # type: ignore[no-any-return]
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def check_vocabulary(model: Any, windows: Tensor) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        InputError: there is one.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= vocabulary:
        raise InputError(
            f"token {int(windows.max())} is beyond the model's vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model."
        )


@dataclass(frozen=True)
class CalibrationText:
    """The tokens of a calibration text.

    Attributes:
        windows: to calibrate on, int64 [windows, context].
        held_out: tokens that calibration does not see, int64 [tokens]; None: the text is too short to spare any.
    """

    windows: Tensor
    held_out: Tensor | None

    @classmethod
    def read(
        cls, text: str | Ids, tokenizer: Any, *, tokens: int, context: int, held_out: int = 0, source: str
    ) -> CalibrationText:
        """Tokenize a text, and hold some of it out.

        Args:
            text: the text, or its token ids.
            tokenizer: a transformers tokenizer; not used for ids.
            tokens: to calibrate on; fewer where the text has fewer.
            context: tokens of a window.
            held_out: tokens that are wanted behind those; of a text that has not as many, a fifth. 0: none.
            source: where the text is from, for messages.

        Raises:
            InputError: the text has too few tokens.
        """
        windows = token_windows(
            text, tokenizer, tokens=tokens, context=context, source=source, least=LEAST_TOKENS
        )
        if not held_out:
            return cls(windows, None)
        if isinstance(text, str):
            ids = torch.tensor(token_ids(text, tokenizer, tokens + held_out), dtype=torch.int64)
        else:
            ids = as_ids(text, source)[: tokens + held_out]
        rest = ids[tokens:]
        if len(rest) >= min(held_out, 4 * LEAST_TOKENS):
            return cls(windows, rest)
        share = max(LEAST_TOKENS, len(ids) // 5)
        if len(ids) - share < LEAST_TOKENS:
            return cls(windows, None)
        return cls(in_windows(ids[: len(ids) - share][:tokens], context), ids[len(ids) - share :])


@contextlib.contextmanager
def float32_activations(model: nn.Module, *, restore_after_each: bool = True) -> Iterator[None]:
    """Run a 16-bit model with float32 activations; each module widens its parameters while it runs.

    Args:
        model: any.
        restore_after_each: False leaves modules that ran wide until the end, as a backward pass needs it.
    """
    kept: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            kept.setdefault(parameter, parameter.data)
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, _args: Any, _output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(parameter)

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # widening a whole vocabulary would cost more than the model
            hooks.append(module.register_forward_hook(lambda _module, _args, output: output.float()))
        elif any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(widen))
            if restore_after_each:
                hooks.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in kept.items():  # left over when a module raised
            parameter.data = data
