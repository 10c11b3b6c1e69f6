"""How much the loss grows when a layer's weights are clustered, and which layers deserve more bits.

With labels drawn from the model itself, the KL divergence that a small change d of the weights makes is
1/2 d' F d, F the Fisher information. Of F we keep the diagonal, as the product of the mean square of each
input channel and the mean square of the loss gradient of each output channel (the factors of K-FAC,
Martens & Grosse 2015, arXiv 1503.05671, of which only the diagonals are needed here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.errors import InputError
from edkm_export.models.conv1d import is_conv1d
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.recipe import Recipe, Rule
from edkm_export.training.surgery import Importance, seed_centroids

__all__ = ["Estimate", "allocate_bits", "average_bits", "estimate_loss", "fisher_factors", "mixed_recipe"]


def fisher_factors(
    model: Any, windows: Tensor, *, seed: int = 0, advance: Callable[[], None] | None = None
) -> dict[str, Importance]:
    """Mean squares of inputs and of output gradients of each linear layer.

    Args:
        model: a float causal language model of transformers.
        windows: int64 [windows, context], on the model's device.
        seed: of the labels that are drawn from the model's own distribution.
        advance: called after each window.

    Returns:
        {module name: Importance}.

    Raises:
        InputError: an activation or gradient is not finite.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
        square = values.detach().float().reshape(-1, values.shape[-1]).square().sum(0)
        sums[name] = sums[name] + square if name in sums else square

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> None:
            add(inputs, name, args[0])
            if output.requires_grad:
                output.register_hook(lambda grad: add(outputs, name, grad))  # type: ignore[no-untyped-call]

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    ]
    # Gradients of activations are enough: they start at the embeddings, and no parameter needs its own.
    hooks.append(
        model.get_input_embeddings().register_forward_hook(
            lambda _module, _args, output: output.requires_grad_()
        )
    )
    generator = torch.Generator(device=windows.device).manual_seed(seed)
    try:
        for window in windows:
            with torch.enable_grad():
                logits = model(input_ids=window[None], use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                torch.autograd.backward(loss)
            if advance is not None:
                advance()
    finally:
        for hook in hooks:
            hook.remove()
    tokens = windows.numel()
    found = {}
    for name, energy in inputs.items():
        gradient = outputs.get(name)
        if not bool(torch.isfinite(energy).all()) or (
            gradient is not None and not bool(torch.isfinite(gradient).all())
        ):
            raise InputError(f"{name}: activations or gradients are not finite on the calibration text.")
        found[name] = Importance(energy / tokens, None if gradient is None else gradient / tokens)
    return found


@dataclass(frozen=True)
class Estimate:
    """What a choice of bits for one layer costs.

    Attributes:
        loss: estimated growth of the loss in nats a token.
        size_bits: storage of indices and LUTs.
    """

    loss: float
    size_bits: int


def estimate_loss(
    weights: Mapping[str, Tensor],
    rules: Mapping[str, Rule],
    importance: Mapping[str, Importance],
    *,
    advance: Callable[[str], None] | None = None,
) -> tuple[dict[str, dict[int, Estimate]], dict[tuple[str, int], Tensor]]:
    """Estimate each layer at its rule's bits and at the next larger sizes.

    Args:
        weights: {module name: float [out, in]}.
        rules: {module name: its rule}.
        importance: {module name: Fisher factors}; layers without are left out.
        advance: called with the name of each layer that is done.

    Returns:
        {module name: {bits: Estimate}}, and the centroids {(module name, bits): [groups, k]}.
    """
    table: dict[str, dict[int, Estimate]] = {}
    seeds: dict[tuple[str, int], Tensor] = {}
    for name, weight in weights.items():
        rule = rules[name]
        found = importance.get(name)
        if found is not None:
            table[name] = {}
            for bits in _sizes(rule.bits):
                wider = rule.model_copy(update={"bits": bits})
                centroids, error = seed_centroids(weight, wider, found)
                seeds[name, bits] = centroids
                lut_bits = centroids.numel() * (16 if rule.lut_dtype == "float16" else 8)
                table[name][bits] = Estimate(float(error.sum()) / 2, weight.numel() * bits + lut_bits)
        if advance is not None:
            advance(name)
    return table, seeds


def _sizes(bits: int) -> list[int]:
    """Two more sizes; above 3 bits one, as the gain falls fourfold with each bit and clustering takes longer."""
    return [size for size in SUPPORTED_BITS if size >= bits][: 3 if bits <= 3 else 2]


def allocate_bits(table: Mapping[str, Mapping[int, Estimate]], budget_bits: int) -> dict[str, int]:
    """Choose bits for each layer: the least estimated loss that fits.

    Greedy on gain per bit, over all larger sizes of each layer: within one layer's step of the optimum.

    Args:
        table: {module name: {bits: Estimate}}.
        budget_bits: storage for all layers together.

    Returns:
        {module name: bits}.

    Raises:
        InputError: not even the smallest sizes fit.
    """
    chosen = {name: min(choices) for name, choices in table.items()}
    left = budget_bits - sum(table[name][bits].size_bits for name, bits in chosen.items())
    if left < 0:
        raise InputError(
            f"{budget_bits} bits are not enough: the smallest choice takes {budget_bits - left}. "
            "Use a larger --target-bits or fewer --bits."
        )
    while True:
        best: tuple[float, str, int] | None = None
        for name, choices in table.items():
            now = choices[chosen[name]]
            for bits, choice in choices.items():
                cost = choice.size_bits - now.size_bits
                gain = now.loss - choice.loss
                if (
                    bits > chosen[name]
                    and cost <= left
                    and gain > 0
                    and (best is None or gain / cost > best[0])
                ):
                    best = (gain / cost, name, bits)
        if best is None:
            return chosen
        _, name, bits = best
        left -= table[name][bits].size_bits - table[name][chosen[name]].size_bits
        chosen[name] = bits


def mixed_recipe(base: Recipe, chosen: Mapping[str, int], plan: Mapping[str, Rule]) -> Recipe:
    """A recipe with a rule of its own for each layer that differs from the base."""
    rules = [
        plan[name].model_copy(update={"match": name, "bits": bits, "optional": False})
        for name, bits in chosen.items()
        if bits != plan[name].bits
    ]
    return Recipe(name=f"{base.name}-mixed", rules=(*rules, *base.rules))


def average_bits(shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, Rule]) -> float:
    """Bits a weight over the layers of a plan, LUTs included.

    Args:
        shapes: {module name: weight shape}, at least of the plan's layers.
        plan: {module name: rule}.
    """
    size = weights = 0
    for name, rule in plan.items():
        rows = shapes[name][0]
        numel = 1
        for length in shapes[name]:
            numel *= length
        groups = rows // (rule.group_size or rows)
        lut_bits = 16 if rule.lut_dtype == "float16" else 8
        size += numel * rule.bits + groups * ((1 << rule.bits) * lut_bits + (16 if lut_bits == 8 else 0))
        weights += numel
    return size / max(1, weights)
