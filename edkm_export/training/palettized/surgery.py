"""Put palettized modules into a model, and take a checkpoint out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.activity import tracked
from edkm_export.checkpoint import Checkpoint
from edkm_export.clustering import optimal_centroids
from edkm_export.errors import InputError
from edkm_export.palette import PalettizedTensor
from edkm_export.palettization import compact
from edkm_export.recipe import Recipe, Rule
from edkm_export.reference.conv1d import conv1d_weights, held_weight, is_conv1d
from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.training.palettized.clusters import ClusterMethod, Clusters
from edkm_export.training.palettized.modules import (
    PalettizedConv1D,
    PalettizedConv2d,
    PalettizedEmbedding,
    PalettizedLinear,
    PalettizedModule,
)
from edkm_export.training.palettized.tables import look_up

__all__ = [
    "Importance",
    "attach",
    "clusters_of",
    "embedding_scale",
    "importance_of",
    "insert_clusters",
    "insert_palettes",
    "palettize_layers",
    "replace_clusters",
    "seed_centroids",
    "to_checkpoint",
    "trainable_shapes",
]

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Importance:
    """What a squared error of each weight costs, as a product.

    Attributes:
        inputs: float32 [in], mean square of each input channel. Of an embedding: of the loss gradient of each column.
        outputs: float32 [out], mean square of the loss gradient of each output channel; None: all alike. Of an
            embedding: how often each row is looked up.
        products: float32 [in, in], the mean of which `inputs` is the diagonal; None: not measured.
        further: of another use of the same weight, as an output head that is the embedding; what they cost adds up.
    """

    inputs: Tensor
    outputs: Tensor | None = None
    products: Tensor | None = None
    further: Importance | None = None

    def of_weights(self, rows: int, columns: int) -> Tensor:
        """Of each weight, float32 [rows, columns], on the CPU; a kernel's weights share that of their channel."""
        inputs = self.inputs.float().cpu().repeat_interleave(columns // self.inputs.numel())
        outputs = torch.ones(rows) if self.outputs is None else self.outputs.float().cpu()
        found = torch.outer(outputs, inputs)
        return found if self.further is None else found + self.further.of_weights(rows, columns)

    def row_cost(self) -> Tensor | None:
        """C, float32 [in, in], on the CPU: a change e of a row costs e' C e, on average; None: not measured."""
        if self.products is None:
            return None
        share = 1.0 if self.outputs is None else float(self.outputs.mean())
        found = self.products.float().cpu() * share
        further = None if self.further is None else self.further.row_cost()
        return found if further is None else found + further

    def cpu(self) -> Importance:
        """The same on the CPU."""
        outputs, products = (None if each is None else each.cpu() for each in (self.outputs, self.products))
        further = None if self.further is None else self.further.cpu()
        return Importance(self.inputs.cpu(), outputs, products, further)


def _is_embedding(module: nn.Module) -> bool:
    """True for Gemma's scaled embeddings too."""
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and embedding_scale(module) != 1)


def embedding_scale(module: nn.Module) -> float:
    """The factor that Gemma's embeddings multiply their output by; one for others."""
    return float(getattr(module, "scalar_embed_scale", 1.0))


def _targets(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=True):
        if type(module) in (nn.Linear, nn.Conv2d) or _is_embedding(module) or is_conv1d(module):
            yield name, module


def trainable_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{module name: weight shape (out, in, ...)} of every layer that can be palettized; tied ones once."""
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for name, module in _targets(model):
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            shape = tuple(module.weight.shape)  # type: ignore[arg-type]
            shapes[name] = shape[::-1] if is_conv1d(module) else shape
    return shapes


@torch.no_grad()
def seed_centroids(
    weight: Tensor, rule: Rule, importance: Importance | None = None, *, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exact k-means of each group.

    Args:
        weight: float [out, in, ...].
        rule: bits and group size.
        importance: weighs the error; None: all weights alike.
        threads: that groups are spread over; None: as many as torch uses.

    Returns:
        Centroids float64 [groups, k], and the squared error of each group float64 [groups], weighted.
    """
    out = weight.shape[0]
    groups = out // (rule.group_size or out)
    grouped = weight.detach().reshape(groups, -1)
    if float(torch.stack(grouped.aminmax()).abs().max()) < _FLOAT16_MAX:
        grouped = grouped.half()  # a histogram instead of sorting; the masters keep their digits
    grouped = grouped.cpu()
    weights = None
    if importance is not None:
        same = (
            importance.outputs is None and importance.further is None
        )  # in all rows, so that those of a group do
        rows = out // groups if same else out
        weights = importance.of_weights(rows, weight[0].numel())
        weights = weights.flatten() if same else weights.view(groups, -1)
    return optimal_centroids(grouped, 1 << rule.bits, importance=weights, threads=threads)


def insert_clusters(
    model: nn.Module,
    recipe: Recipe,
    *,
    method: ClusterMethod,
    importance: Mapping[str, Importance] | None = None,
    seeds: Mapping[tuple[str, int], Tensor] | None = None,
    seeded: bool = True,
    in_bfloat16: bool = False,
    source: str = "model",
    advance: Callable[[str, int], None] | None = None,
) -> nn.Module:
    """Replace the layers that the recipe names by palettized ones, seeded by exact weighted k-means.

    Args:
        model: changed in place; its weights become the master weights.
        recipe: bits, groups and LUT dtype by module name.
        method: how gradients pass the clustering.
        importance: {module name: importance of its weights}.
        seeds: centroids that are known already, {(module name, bits): float [groups, k]}.
        seeded: False leaves LUTs and indices to be loaded from a checkpoint of the run.
        in_bfloat16: products will run in bfloat16, see `Grid`.
        source: name of the model, for messages.
        advance: called with a module's name and its number of weights when it is done.

    Returns:
        The model.

    Raises:
        RecipeError, PaletteError: the recipe does not fit the model.
        InputError: a weight is not finite, or a layer is of a kind that cannot be trained.
    """
    palettize_layers(
        model,
        recipe.plan(trainable_shapes(model), source),
        method=method,
        importance=importance,
        seeds=seeds,
        seeded=seeded,
        in_bfloat16=in_bfloat16,
        source=source,
        advance=advance,
    )
    return model


def palettize_layers(
    model: nn.Module,
    plan: Mapping[str, Rule],
    *,
    method: ClusterMethod,
    importance: Mapping[str, Importance] | None = None,
    seeds: Mapping[tuple[str, int], Tensor] | None = None,
    seeded: bool = True,
    in_bfloat16: bool = False,
    source: str = "model",
    advance: Callable[[str, int], None] | None = None,
) -> None:
    """Replace some layers, as `insert_clusters` replaces those of a recipe.

    Args:
        model: changed in place; these layers have values, others need none.
        plan: {module name: rule}, in the order in which they are replaced.
        method: see `insert_clusters`, as for the others.
        importance: of weights without seeds.
        seeds: centroids that are known.
        seeded: whether there are centroids yet.
        in_bfloat16: whether products will run in bfloat16.
        source: name of the model.
        advance: called with what is done.

    Raises:
        InputError: a weight is not finite, or a layer is of a kind that cannot be trained.
    """
    users = _users(model)
    for name, rule in tracked(plan.items(), "clustering", "weights"):
        layer: Any = model.get_submodule(name)
        weight = held_weight(layer)
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"{source}: {name}.weight holds NaN or infinity; the model is broken.")
        sharing = users[id(layer.weight)]
        if not seeded:
            centroids = torch.zeros(weight.shape[0] // (rule.group_size or weight.shape[0]), 1 << rule.bits)
        elif seeds is not None and (name, rule.bits) in seeds:
            centroids = seeds[name, rule.bits]
        else:
            centroids, _ = seed_centroids(weight, rule, _known(importance, sharing))
        clusters = Clusters(weight, centroids, rule, method, in_bfloat16=in_bfloat16)
        for user, old in sharing:
            _replace(model, user, _palettized(f"{source}: {user}", old, clusters))
        if advance is not None:
            advance(name, weight.numel())


def _users(model: nn.Module) -> dict[int, list[tuple[str, Any]]]:
    """{id of a weight: names and modules of those that share it}."""
    users: dict[int, list[tuple[str, Any]]] = {}
    for name, module in _targets(model):
        users.setdefault(id(module.weight), []).append((name, module))
    return users


def _known(
    importance: Mapping[str, Importance] | None, sharing: Sequence[tuple[str, Any]]
) -> Importance | None:
    return next((importance[user] for user, _ in sharing if user in importance), None) if importance else None


def importance_of(
    model: nn.Module, plan: Iterable[str], importance: Mapping[str, Importance]
) -> dict[str, Importance]:
    """Importance of the weights of some layers: a tied one has that of whichever of its modules was measured."""
    users = _users(model)
    found = {name: _known(importance, users[id(model.get_submodule(name).weight)]) for name in plan}
    return {name: each for name, each in found.items() if each is not None}


@torch.no_grad()
def insert_palettes(
    model: nn.Module,
    palettes: Mapping[str, PalettizedTensor],
    rules: Mapping[str, Rule],
    *,
    method: ClusterMethod,
    margin: float = 0.1,
) -> nn.Module:
    """Replace layers by palettized ones that begin at palettes which are known.

    Each master weight is the layer's own, moved into the cell of its index, so that the nearest entry is the palette's.

    Args:
        model: changed in place.
        palettes: {module name: palette of its weight}; one LUT for each group of rows.
        rules: {module name: its rule}, of which the palettes are.
        method: how gradients pass the clustering.
        margin: how far inside of the cell a weight from outside is put, as a share of the way to its entry.

    Returns:
        The model.
    """
    for name, palette in palettes.items():
        layer: Any = model.get_submodule(name)
        weight = held_weight(layer)
        centroids = palette.lut_values().to(weight.device, torch.float32).flatten(1)  # [groups, k]
        indices = palette.unpack_indices().to(weight.device).view(len(centroids), -1)
        masters = _in_cells(weight.reshape(len(centroids), -1), centroids, indices, margin)
        clusters = Clusters(masters.view_as(weight), centroids, rules[name], method)
        _replace(model, name, _palettized(name, layer, clusters))
    return model


def _in_cells(weight: Tensor, centroids: Tensor, indices: Tensor, margin: float) -> Tensor:
    """Weights [groups, m] where their nearest centroids [groups, k] are those of the indices."""
    ordered, places = centroids.sort(1)
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    ends = torch.full_like(ordered[:, :1], torch.inf)
    low = torch.cat([-ends, middles + margin * (ordered[:, 1:] - middles)], 1)
    high = torch.cat([middles - margin * (middles - ordered[:, :-1]), ends], 1)
    low, high = (torch.empty_like(each).scatter_(1, places, each) for each in (low, high))
    return weight.clamp(look_up(low, indices), look_up(high, indices))


def _palettized(where: str, module: Any, clusters: Clusters) -> PalettizedModule:
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            raise InputError(
                f"{where}: embeddings with max_norm, sparse or scale_grad_by_freq cannot be trained."
            )
        return PalettizedEmbedding(clusters, module.padding_idx, embedding_scale(module))
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise InputError(f"{where}: padding mode {module.padding_mode!r} cannot be trained, use zeros.")
        return PalettizedConv2d(clusters, bias, module)
    if is_conv1d(module):
        return PalettizedConv1D(clusters, bias)
    return PalettizedLinear(clusters, bias)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), child, module)


def clusters_of(model: nn.Module) -> dict[str, Clusters]:
    """{name of the first module that has them: its clusters}."""
    found: dict[str, Clusters] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PalettizedModule) and id(module.clusters) not in seen:
            seen.add(id(module.clusters))
            found[name] = module.clusters
    return found


def replace_clusters(model: nn.Module, made: Mapping[Clusters, Clusters]) -> None:
    """Put other clusters in the place of some, in each module that shares them."""
    for module in model.modules():
        if isinstance(module, PalettizedModule) and module.clusters in made:
            module.clusters = made[module.clusters]


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Cluster anew after each step of an optimizer, in the next forward pass.

    Args:
        model: with palettized modules.
        optimizer: of its parameters, or of some of them. Each optimizer is attached once.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [clusters for clusters in clusters_of(model).values() if clusters.attach(held)]

    def stepped(*_: object) -> None:
        for clusters in trained:
            clusters.stepped()

    optimizer.register_step_post_hook(stepped)


@torch.no_grad()
def to_checkpoint(
    model: Any,
    recipe: Recipe,
    *,
    tokenizer: Mapping[str, bytes] | None = None,
    provenance: Mapping[str, Any] | None = None,
    whole: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach,
) -> Checkpoint:
    """Exactly what the hard forward pass of the model uses.

    Parameters that are not palettized keep float32 where float16 would change them. `whole` makes ordinary
    tensors of parameters of which each process holds a share.
    """
    palettized: dict[str, PalettizedTensor] = {}
    tied: dict[str, str] = {}
    stored: dict[int, str] = {}  # of clusters and of other parameters
    for name, module in model.named_modules():
        if isinstance(module, PalettizedModule):
            weight_name = f"{name}.weight"
            first = stored.setdefault(id(module.clusters), weight_name)
            if first == weight_name:
                palettized[weight_name] = module.clusters.export(weight_name)
            else:
                tied[weight_name] = first
    dense: dict[str, Tensor] = {}
    turned = conv1d_weights(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".clusters." in f".{name}":
            continue
        first = stored.setdefault(id(parameter), name)
        if first == name:
            tensor = whole(parameter).cpu()
            dense[name] = compact(tensor.t().contiguous() if name in turned else tensor)
        else:
            tied[name] = first
    numbers = stored_buffers(model)
    dense |= {name: compact(numbers[name]) for name in numbers if ".clusters." not in f".{name}"}
    return Checkpoint(
        config=model.config.to_dict(),
        palettized=palettized,
        dense=dense,
        tied=tied,
        tokenizer=dict(tokenizer or {}),
        recipe=recipe.model_dump(mode="json"),
        provenance=dict(provenance or {}),
    )
