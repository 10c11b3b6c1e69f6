"""How much the loss grows when a layer's weights are clustered, and which layers deserve more bits.

With labels drawn from the model itself, the KL divergence that a small change d of the weights makes is
1/2 d' F d, F the Fisher information. Of F we keep the diagonal, as the product of the mean square of each
input channel and the mean square of the loss gradient of each output channel (the factors of K-FAC,
Martens & Grosse 2015, arXiv 1503.05671, of which only the diagonals are needed here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.activity import tracked
from edkm_export.errors import InputError
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.recipe import Recipe, Rule
from edkm_export.reference.conv1d import is_conv1d
from edkm_export.training.first_centroids import Seeding
from edkm_export.training.palettized.surgery import Importance, embedding_scale, seed_centroids
from edkm_export.training.wide_gradients import float32_gradients
from edkm_export.weight_storage import storage_bits

__all__ = [
    "Sensitivity",
    "allocate_bits",
    "fisher_factors",
    "mixed_recipe",
    "wider_rules",
]


def fisher_factors(
    model: Any,
    windows: Tensor,
    *,
    seed: int = 0,
    vocabulary: bool = False,
    advance: Callable[[], None] | None = None,
) -> dict[str, Importance]:
    """Mean squares of inputs and of output gradients of each linear layer.

    Args:
        model: a float causal language model of transformers, whose parameters take no gradients.
        windows: int64 [windows, context], on the model's device.
        seed: of the labels that are drawn from the model's own distribution.
        vocabulary: of embeddings, too; one that is the output head has the sum of both uses, under the embedding's
            name. Rows of a vocabulary count half as they did on the windows and half all the same: most tokens do not
            occur there, and would otherwise be free to be anything.
        advance: called after each window.

    Returns:
        {module name: Importance}, with `products` of embeddings and output head when `vocabulary` is set.

    Raises:
        InputError: an activation or gradient is not finite.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    head = model.get_output_embeddings()

    def add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
        sums[name] = sums[name] + values if name in sums else values

    def rows_of(values: Tensor) -> Tensor:
        return values.detach().float().reshape(-1, values.shape[-1])

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            rows = rows_of(args[0])
            add(inputs, name, rows.square().sum(0))
            if vocabulary and module is head:
                add(products, name, rows.t() @ rows)
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda grad: add(outputs, name, rows_of(grad).square().sum(0))
                )

        return hook

    def watch_lookups(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            counts = torch.bincount(args[0].flatten(), minlength=module.num_embeddings).float()

            def count(grad: Tensor) -> None:
                rows = rows_of(grad) * embedding_scale(module)
                add(inputs, name, rows.square().sum(0))
                add(products, name, rows.t() @ rows)
                add(outputs, name, counts)

            output.requires_grad_().register_hook(count)  # type: ignore[no-untyped-call]

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    ]
    # Gradients of activations are enough: they start at the embeddings, and no parameter needs its own.
    if not vocabulary:
        hooks.append(
            model.get_input_embeddings().register_forward_hook(
                lambda _module, _args, output: output.requires_grad_()
            )
        )
    generator = torch.Generator(device=windows.device).manual_seed(seed)
    try:
        with float32_gradients(model), torch.enable_grad():
            hooks += [  # after those that widen what is looked up
                module.register_forward_hook(watch_lookups(name))
                for name, module in model.named_modules()
                if vocabulary and isinstance(module, nn.Embedding)
            ]
            for window in tracked(windows, "calibration text", "windows"):
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
        if name in products:
            found[name] = _of_vocabulary(found[name], products[name] / tokens)
    return _with_both_uses(model, found) if vocabulary else found


def _of_vocabulary(found: Importance, products: Tensor) -> Importance:
    assert found.outputs is not None
    outputs = (found.outputs + found.outputs.mean()) / 2
    return replace(found, outputs=outputs, products=products)


def _with_both_uses(model: Any, found: dict[str, Importance]) -> dict[str, Importance]:
    """Of a weight that is embedding and output head, the sum of both, under each name."""
    ends = {id(end): end for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in ends and name in found]
    if len(names) == 2 and len({id(model.get_submodule(name).weight) for name in names}) == 1:
        both = replace(found[names[0]], further=found[names[1]])
        return {**found, names[0]: both, names[1]: both}
    return found


class Sensitivity:
    """What each choice of bits for each layer costs: its storage, and how much the loss grows.

    A layer is clustered at a size only when that size's loss is asked for.

    Attributes:
        sizes: {module name: {bits: storage of indices and LUTs in bits}}.
        seeds: what was clustered whole so far, {(module name, bits): centroids [groups, k]}.
        tried: how many losses were estimated.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        choices: Mapping[str, Mapping[int, Rule]],
        importance: Mapping[str, Importance],
        seeding: Seeding | None = None,
        *,
        sampled: int | None = None,
    ) -> None:
        """Nothing is clustered yet.

        Args:
            weights: {module name: float [out, in]}.
            choices: {module name: {bits: the rule that it would have}}.
            importance: {module name: Fisher factors}; layers without are left out.
            seeding: what clusters them, and reads them for it, so that of `weights` the shapes are enough; None: in
                this process.
            sampled: cluster about so many weights of each layer, in rows that lie evenly in it, and take their share
                of the error for that of all; None: cluster all.
        """
        self._choices, self._importance = choices, importance
        self._seeding = Seeding(weights.__getitem__) if seeding is None else seeding
        self._large = {
            name for name, weight in weights.items() if sampled is not None and weight.numel() > sampled
        }
        self._sampled = sampled or 0
        self.sizes = {
            name: {bits: storage_bits(weight.shape, rule) for bits, rule in choices[name].items()}
            for name, weight in weights.items()
            if name in importance
        }
        self.seeds: dict[tuple[str, int], Tensor] = {}
        self._losses: dict[tuple[str, int], float] = {}
        self._samples: dict[tuple[str, int], _Sample] = {}

    @property
    def tried(self) -> int:  # noqa: D102
        return len(self._losses)

    def cluster(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Cluster layers (module name, bits) together, so that their losses are known."""
        jobs = [
            (name, self._choices[name][bits]) for name, bits in wanted if (name, bits) not in self._losses
        ]
        for key, (centroids, loss) in self._seeding.share_out(jobs, self._estimate).items():
            if centroids is not None:
                self.seeds[key] = centroids
            self._losses[key] = loss

    def cluster_smallest(self) -> None:
        """Cluster each layer at its smallest size: the losses that are always asked for."""
        self.cluster((name, min(choices)) for name, choices in self.sizes.items())

    def loss(self, name: str, bits: int) -> float:
        """Estimated growth of the loss in nats a token."""
        self.cluster([(name, bits)])
        return self._losses[name, bits]

    def _estimate(self, name: str, rule: Rule, threads: int) -> tuple[Tensor | None, float]:
        """Centroids of a layer, if it is clustered whole, and the loss."""
        if name not in self._large:
            centroids, error = seed_centroids(
                self._seeding.read(name), rule, self._importance[name], threads=threads
            )
            return centroids, float(error.sum()) / 2
        sample = self._sample(name, rule)
        _, error = seed_centroids(sample.weight, rule, sample.importance, threads=threads)
        return None, float(error.sum()) / 2 * sample.scale

    def _sample(self, name: str, rule: Rule) -> _Sample:
        """Rows that stand for a layer."""
        key = name, rule.group_size
        if key not in self._samples:
            self._samples[key] = _Sample.of(
                self._seeding.read(name), rule.group_size or 1, self._importance[name], self._sampled
            )
        return self._samples[key]


@dataclass(frozen=True)
class _Sample:
    """Some rows of a weight.

    Attributes:
        weight: float [rows, in].
        importance: of these rows.
        scale: what the weights are worth, by importance times square, as a multiple of what these rows are.
    """

    weight: Tensor
    importance: Importance
    scale: float

    @classmethod
    def of(cls, weight: Tensor, unit: int, importance: Importance, numel: int) -> _Sample:
        """At least four units of so many rows, that lie evenly."""
        rows, columns = weight.shape
        units = rows // unit
        count = min(units, max(4, numel // (unit * columns)))
        first = torch.linspace(0, units - 1, count).round().long() * unit
        chosen = (first[:, None] + torch.arange(unit)).flatten()
        part = _rows_of(importance, chosen)
        sampled = weight[chosen.to(weight.device)]
        share = _worth(sampled, part)
        return cls(sampled, part, _worth(weight, importance) / share if share > 0 else 1.0)


def _rows_of(importance: Importance, rows: Tensor) -> Importance:
    outputs = None if importance.outputs is None else importance.outputs.cpu()[rows]
    further = None if importance.further is None else _rows_of(importance.further, rows)
    return replace(importance, outputs=outputs, further=further)


def _worth(weight: Tensor, importance: Importance) -> float:
    """Sum of importance times square of all weights."""
    squares = weight.detach().cpu().float().square()
    by_row = squares @ importance.inputs.float().cpu()
    total = by_row.sum() if importance.outputs is None else by_row @ importance.outputs.float().cpu()
    return float(total) + (0.0 if importance.further is None else _worth(weight, importance.further))


def wider_rules(rule: Rule) -> dict[int, Rule]:
    """{bits: rule} of a rule and two more sizes.

    Above 3 bits it is one, as the gain falls fourfold with each bit and clustering takes longer.
    """
    sizes = [size for size in SUPPORTED_BITS if size >= rule.bits][: 3 if rule.bits <= 3 else 2]
    return {bits: rule.with_bits(bits) for bits in sizes}


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


def mixed_recipe(base: Recipe, chosen: Mapping[str, Rule], plan: Mapping[str, Rule]) -> Recipe:
    """A recipe with a rule of its own for each layer that differs from the base."""
    rules = [
        rule.model_copy(update={"match": name, "optional": False})
        for name, rule in chosen.items()
        if rule.bits != plan[name].bits
    ]
    return Recipe(name=f"{base.name}-mixed", rules=(*rules, *base.rules))
