"""How much the loss grows when a layer's weights are clustered, and which layers deserve more bits.

With labels drawn from the model itself, the KL divergence that a small change d of the weights makes is
1/2 d' F d, F the Fisher information. Of F we keep the diagonal, as the product of the mean square of each
input channel and the mean square of the loss gradient of each output channel (the factors of K-FAC,
Martens & Grosse 2015, arXiv 1503.05671, of which only the diagonals are needed here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.activity import tracked
from edkm_export.errors import InputError
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.recipe import Recipe, Rule
from edkm_export.reference.conv1d import is_conv1d
from edkm_export.training.first_centroids import Seeding
from edkm_export.training.palettized.surgery import Importance
from edkm_export.weight_storage import storage_bits

__all__ = [
    "Sensitivity",
    "allocate_bits",
    "fisher_factors",
    "mixed_recipe",
]


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
        for window in tracked(windows, "calibration text", "windows"):
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


class Sensitivity:
    """What each choice of bits for each layer costs: its storage, and how much the loss grows.

    A layer is clustered at a size only when that size's loss is asked for.

    Attributes:
        sizes: {module name: {bits: storage of indices and LUTs in bits}}, from each layer's rule upwards.
        seeds: what was clustered so far, {(module name, bits): centroids [groups, k]}.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        rules: Mapping[str, Rule],
        importance: Mapping[str, Importance],
        seeding: Seeding | None = None,
    ) -> None:
        """Nothing is clustered yet.

        Args:
            weights: {module name: float [out, in]}.
            rules: {module name: its rule}.
            importance: {module name: Fisher factors}; layers without are left out.
            seeding: what clusters them, and reads them for it, so that of `weights` the shapes are enough; None: in
                this process.
        """
        self._rules, self._importance = rules, importance
        self._seeding = Seeding(weights.__getitem__) if seeding is None else seeding
        self.sizes = {
            name: {
                bits: storage_bits(weight.shape, self._rule(name, bits)) for bits in _sizes(rules[name].bits)
            }
            for name, weight in weights.items()
            if name in importance
        }
        self.seeds: dict[tuple[str, int], Tensor] = {}
        self._losses: dict[tuple[str, int], float] = {}

    def _rule(self, name: str, bits: int) -> Rule:
        return self._rules[name].with_bits(bits)

    def cluster(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Cluster layers (module name, bits) together, so that their losses are known."""
        jobs = [(name, self._rule(name, bits)) for name, bits in wanted if (name, bits) not in self._losses]
        for key, (centroids, error) in self._seeding.find(jobs, self._importance).items():
            self.seeds[key] = centroids
            self._losses[key] = float(error.sum()) / 2

    def cluster_smallest(self) -> None:
        """Cluster each layer at its smallest size: the losses that are always asked for."""
        self.cluster((name, min(choices)) for name, choices in self.sizes.items())

    def loss(self, name: str, bits: int) -> float:
        """Estimated growth of the loss in nats a token."""
        self.cluster([(name, bits)])
        return self._losses[name, bits]


def _sizes(bits: int) -> list[int]:
    """Two more sizes; above 3 bits one, as the gain falls fourfold with each bit and clustering takes longer."""
    return [size for size in SUPPORTED_BITS if size >= bits][: 3 if bits <= 3 else 2]


def allocate_bits(
    sizes: Mapping[str, Mapping[int, int]], loss: Callable[[str, int], float], budget_bits: int
) -> dict[str, int]:
    """Choose bits for each layer: the least estimated loss that fits.

    Greedy on gain per bit, over all larger sizes of each layer: within one choice of a single layer of the optimum. No
    size can gain more than the whole loss of the present one, so that most losses are never asked for.

    Args:
        sizes: {module name: {bits: storage in bits}}.
        loss: of a module's name and bits; never negative.
        budget_bits: storage for all layers together.

    Returns:
        {module name: bits}.

    Raises:
        InputError: not even the smallest sizes fit.
    """
    chosen = {name: min(choices) for name, choices in sizes.items()}
    left = budget_bits - sum(sizes[name][bits] for name, bits in chosen.items())
    if left < 0:
        raise InputError(
            f"{budget_bits} bits are not enough: the smallest choice takes {budget_bits - left}; allow that many, or "
            "start from fewer bits."
        )
    while True:
        larger = []
        for name, choices in sizes.items():
            now = chosen[name]
            for bits, size in choices.items():
                cost = size - choices[now]
                if bits > now and cost <= left:
                    larger.append((loss(name, now) / cost, cost, name, bits))
        best: tuple[float, int, str, int] | None = None
        for bound, cost, name, bits in sorted(larger, key=lambda each: -each[0]):
            if best is not None and bound <= best[0]:
                break
            gain = (loss(name, chosen[name]) - loss(name, bits)) / cost
            if gain > (0 if best is None else best[0]):
                best = gain, cost, name, bits
        if best is None:
            return chosen
        _, cost, name, bits = best
        left -= cost
        chosen[name] = bits


def mixed_recipe(base: Recipe, chosen: Mapping[str, int], plan: Mapping[str, Rule]) -> Recipe:
    """A recipe with a rule of its own for each layer that differs from the base."""
    rules = [
        plan[name].with_bits(bits).model_copy(update={"match": name, "optional": False})
        for name, bits in chosen.items()
        if bits != plan[name].bits
    ]
    return Recipe(name=f"{base.name}-mixed", rules=(*rules, *base.rules))
