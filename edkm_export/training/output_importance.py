"""What an error in the hidden states between two layers costs: second moments of the gradient there.

With labels drawn from the model itself, an error e of the hidden states changes the next-token distributions by a KL
divergence of about 1/2 e' F e, where F is the mean of g g' over the gradients g of the log-likelihood (the Fisher
information; K-FAC's factor of the outputs, arXiv 1503.05671). Hidden states of some tokens are hundreds of times as
large as those of others, and the norms that read them divide by that: errors are measured as shares of the token's own
root mean square, and gradients accordingly.

The gradient goes back layer by layer, each computed once more from inputs that were kept, so that the float32 copy of
one layer is in memory, and not that of the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edkm_export.activity import activity
from edkm_export.calibration import float32_activations, run_body
from edkm_export.errors import InputError
from edkm_export.palette import all_finite
from edkm_export.reference.streamed_model import device_of, streamed_weights, values_of
from edkm_export.training.layer_block import LayerBlock

__all__ = ["OutputWeights", "output_importance", "relative_scale"]

OutputWeights = Literal["full", "diagonal", "tokens", "none"]
"""How errors of a layer's output are weighed: by F, by its diagonal, as shares of the token's size alone, or not."""

_WINDOWS = 16  # more say hardly more of a mean over tokens
_VALUES = 1 << 27  # hidden states that are kept, of all layers: 512 MiB in float32
_WIDEST = 2048  # whose F is kept whole, a square for each layer
_SHRINKAGE = 0.1  # of F towards its diagonal
_FLOOR = (
    1e-6  # of its mean diagonal, so that no direction is free; a channel may be 300 times as large as others
)


def relative_scale(hidden: Tensor) -> Tensor:
    """One over the root mean square of each token: [..., width] -> [..., 1]."""
    return hidden.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def output_importance(
    model: Any,
    windows: Tensor,
    layers: dict[str, nn.Module],
    *,
    kind: Literal["full", "diagonal"] = "full",
    device: torch.device | str = "cpu",
    seed: int = 0,
    batch: int = 4,
) -> dict[str, Tensor]:
    """What relative errors of each layer's output are to be multiplied by, so that their square is what they cost.

    Args:
        model: a float causal language model of transformers, in eval mode; it stays as and where it is.
        windows: int64 [windows, context]; the first 16 are used, fewer where their hidden states are large.
        layers: its stack, in order, see `reconstruction.layers_of`.
        kind: all of F, as a factor L with L L' = F, or the root of its diagonal; the latter for more than 2,048
            channels in any case.
        device: where layers are computed.
        seed: of the labels.
        batch: windows at a time.

    Returns:
        {name of the layer: float32 [width, width] or [width]}; half of the square is an estimate in nats.

    Raises:
        InputError: a gradient is not finite.
    """
    width = model.get_input_embeddings().weight.shape[1]
    kind = kind if width <= _WIDEST else "diagonal"
    windows = windows[: min(_WINDOWS, max(1, _VALUES // (len(layers) * width * windows.shape[1])))]
    found: dict[str, Tensor] = {}
    with activity("measuring what errors cost", len(layers) + 2, "layers") as counted:
        calls, last = _record(model, windows, layers)
        counted.advance()
        gradient = _of_last(model, windows, layers, last, seed).to(device)
        counted.advance()
        output = last.to(device)
        for name in reversed(layers):
            _check(name, gradient)
            found[name] = _factor(gradient, output, kind)
            hidden, args, named = calls.pop(name)
            values = None
            if streamed_weights(model) is not None:
                values = {
                    inner: values_of(model, f"{name}.{inner}") for inner, _ in layers[name].named_parameters()
                }
            block = LayerBlock(
                layers[name], args, named, windows=len(windows), device=torch.device(device), values=values
            )
            output = hidden.to(device)
            gradient = _pulled_back(block, output, gradient, batch)
            counted.advance()
    return {name: found[name] for name in layers}


_Calls = dict[str, tuple[Tensor, tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def _record(model: Any, windows: Tensor, layers: dict[str, nn.Module]) -> tuple[_Calls, Tensor]:
    """Arguments of each layer's call, and what the last makes: hidden states float32 [windows, context, width]."""
    calls: _Calls = {}
    outputs: list[Tensor] = []

    def note(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[name] = args[0].float(), args[1:], dict(named)

    hooks = [
        layer.register_forward_pre_hook(
            lambda _layer, args, named, name=name: note(name, args, named), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    final = list(layers.values())[-1]
    hooks.append(
        final.register_forward_hook(
            lambda _layer, _args, made: outputs.append(made if isinstance(made, Tensor) else made[0])
        )
    )
    try:
        with float32_activations(model):
            run_body(model, windows.to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return calls, outputs[0].float()


def _of_last(model: Any, windows: Tensor, layers: dict[str, nn.Module], last: Tensor, seed: int) -> Tensor:
    """Gradient of the log-likelihood at the output of the last layer, [windows, context, width]."""
    made = torch.empty_like(last)
    generator = torch.Generator(device=last.device).manual_seed(seed)
    for place, window in enumerate(windows):
        leaf = last[place : place + 1].detach().requires_grad_()
        with (
            _answering(layers, leaf),
            float32_activations(model, restore_after_each=False),
            torch.enable_grad(),
        ):
            logits = model(input_ids=window[None].to(device_of(model)), use_cache=False).logits[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            made[place] = torch.autograd.grad(loss, leaf)[0][0]
    return made


@contextlib.contextmanager
def _answering(layers: dict[str, nn.Module], output: Tensor) -> Iterator[None]:
    """The stack makes this, whatever it is given."""
    replaced = [(layer, layer.__dict__.get("forward")) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.forward = functools.partial(_answer, output)
        yield
    finally:
        for layer, own in replaced:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _answer(output: Tensor, *_: Any, **__: Any) -> Tensor:
    return output


def _pulled_back(block: LayerBlock, hidden: Tensor, gradient: Tensor, batch: int) -> Tensor:
    """Gradient at a layer's inputs from that at its outputs, both [windows, context, width]."""
    made = torch.empty_like(hidden)
    for rows in torch.split(torch.arange(len(hidden)), batch):
        leaf = hidden[rows].detach().requires_grad_()
        with torch.enable_grad():
            output = block(leaf, rows)
            made[rows] = torch.autograd.grad(output, leaf, gradient[rows])[0]
    return made


def _factor(gradient: Tensor, output: Tensor, kind: str) -> Tensor:
    """The factor of F, from gradients at outputs [windows, context, width]."""
    scaled = (gradient / relative_scale(output)).flatten(0, 1).double()
    if kind == "diagonal":
        diagonal = scaled.square().mean(0)
        return diagonal.clamp_min(_FLOOR * float(diagonal.mean())).sqrt().float()
    fisher = scaled.t() @ scaled / len(scaled)
    diagonal = fisher.diagonal().clone()
    fisher = fisher * (1 - _SHRINKAGE)
    fisher.diagonal().copy_(diagonal + _FLOOR * diagonal.mean())
    factor: Tensor = torch.linalg.cholesky(fisher)
    return factor.float()


def _check(name: str, gradient: Tensor) -> None:
    if not all_finite(gradient):
        raise InputError(f"{name}: the gradient at its output is not finite on the calibration text.")
