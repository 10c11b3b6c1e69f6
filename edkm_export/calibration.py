"""Activation statistics of a float model on calibration text.

The error that a changed weight makes in a layer's output grows with the mean square of the activation that
meets it, so k-means weighted by that energy minimizes output error rather than weight error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.activity import tracked
from edkm_export.errors import InputError
from edkm_export.memory import return_freed_memory
from edkm_export.reference.conv1d import is_conv1d

__all__ = ["input_energy"]


@torch.no_grad()
def input_energy(
    model: Any, windows: Tensor, *, advance: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Mean square of each input channel of each linear layer.

    Weights stay in 16 bits; each module widens its own to float32 while it runs, so that peak memory grows by one
    layer only and activations beyond float16 do no harm.

    Args:
        model: a causal language model of transformers.
        windows: int64 [windows, context].
        advance: called after each window.

    Returns:
        {module name: float32 [in_features]}, the output head included.

    Raises:
        InputError: an activation is not finite, or a token is beyond the vocabulary.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= vocabulary:
        raise InputError(
            f"token {int(windows.max())} is beyond the model's vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model."
        )
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
        with _float32_activations(model):
            for window in tracked(windows, "calibration text", "windows"):
                hidden = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state
                if head_name is not None:  # its own product, a whole vocabulary wide, is not needed
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
        sums[name] = energy / windows.numel()
    return sums


@contextlib.contextmanager
def _float32_activations(model: nn.Module) -> Iterator[None]:
    """Run a 16-bit model with float32 activations."""
    kept: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            kept[parameter] = parameter.data
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
            hooks.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in kept.items():  # left over when a module raised
            parameter.data = data
