"""One-shot palettization, layer by layer: exact 1-D k-means of every weight, and with a text errors are made up for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edkm_export.clustering import hard_assign, optimal_centroids
from edkm_export.compensated_weight import makes_up, palettize_vocabulary
from edkm_export.errors import InputError, PaletteError
from edkm_export.lut_dtypes import LUT_DTYPES
from edkm_export.lut_grid import round_to_grid
from edkm_export.memory import return_freed_memory
from edkm_export.palette import PalettizedTensor, all_finite, check_grouping
from edkm_export.propagation import Propagation
from edkm_export.recipe import Recipe, Rule
from edkm_export.reference.conv1d import as_linear, is_conv1d
from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.reference.streamed_model import release, streamed_weights, values_of

__all__ = [
    "PALETTIZABLE",
    "Begun",
    "PalettizedModel",
    "compact",
    "in_place",
    "palettizable_shapes",
    "palettize_ends",
    "palettize_model",
    "palettize_weight",
]

PALETTIZABLE = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers whose weight can be palettized; transformers' Conv1D is one too."""

_BLOCK_WEIGHTS = 1 << 22  # weights clustered at a time; bounds the float32 copies


class Begun(Protocol):
    """What is palettized already, since a text went through the model.

    Attributes:
        palettized: {module name: what became of its weight}.
        energy: {module name: float32 [in]} mean square of the inputs of others.
        dense: {parameter name: values, in the model's form} of what stays dense and changed.
    """

    @property
    def palettized(self) -> Mapping[str, PalettizedTensor]: ...  # noqa: D102

    @property
    def energy(self) -> Mapping[str, Tensor]: ...  # noqa: D102

    @property
    def dense(self) -> Mapping[str, Tensor]: ...  # noqa: D102


@dataclass(frozen=True)
class PalettizedModel:
    """Parameters of a model after palettization, by name; see `Checkpoint`.

    Attributes:
        palettized, dense, tied: as of a checkpoint.
        compensated: names of the palettized ones whose errors were made up for.
    """

    palettized: dict[str, PalettizedTensor]
    dense: dict[str, Tensor]
    tied: dict[str, str]
    compensated: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        """One line: how many of each."""
        return f"PalettizedModel({len(self.palettized)} palettized, {len(self.dense)} dense, {len(self.tied)} tied)"


def palettizable_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{module name: weight shape (out, in, *kernel)} of linear, embedding and convolution layers.

    Tied ones are under their first name. A transposed convolution's weight is (in, out, *kernel), as torch holds it.

    Raises:
        InputError: the weight of a layer is no parameter, since something computes it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, PALETTIZABLE) and not is_conv1d(module):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise InputError(
                f"{name or type(module).__name__}: its weight is no parameter but computed, as by weight_norm; make "
                "it one first (torch.nn.utils.parametrize.remove_parametrizations, merge_and_unload)."
            )
        if id(weight) not in seen:
            seen.add(id(weight))
            shapes[name] = tuple(weight.shape)[::-1] if is_conv1d(module) else tuple(weight.shape)
    return shapes


def palettize_model(
    model: Any,
    recipe: Recipe,
    *,
    energy: Mapping[str, Tensor] | None = None,
    windows: Tensor | None = None,
    vocabulary: Mapping[str, Tensor] | None = None,
    begun: Begun | None = None,
    source: str = "model",
    advance: Callable[[str, int], None] | None = None,
    consume: bool = True,
) -> PalettizedModel:
    """Palettize a model as its recipe says.

    Args:
        model: of transformers, or any other module.
        recipe: bits, groups and LUT dtype by module name.
        energy: {module name: float32 [in]} mean square of the layer's inputs, see `calibration`; or as `importance` of
            `palettize_weight`.
        windows: of a causal language model: tokens int64 [windows, context], all of which go through it in one call.
            Its linear layers are then palettized so that each makes up for the errors of its columns and of the layers
            before it, see `propagation`. They give the energy, too.
        vocabulary: with `windows`: {module name: float32 [in, in]} of an embedding and an output head, what an error of
            their rows costs, see `palettize_vocabulary`. Those of few bits make up for their errors, too, and do it
            before the other layers, which then see what is left of these.
        begun: what is palettized already, instead of `energy`, `windows` and `vocabulary`.
        source: name of the model, for messages.
        advance: called with a module's name and its number of weights when it is done.
        consume: free the model's own weights one by one, so that it is used up; False leaves it as it is.

    Returns:
        Palettized and dense parameters; among the dense ones are floating-point buffers that are stored with them, such
        as the statistics of a batch norm. Parameters that are tied stay so.

    Raises:
        RecipeError, PaletteError: the recipe does not fit the model.
        InputError: a weight holds NaN or infinity, or is not floating point.
    """
    plan = recipe.plan(palettizable_shapes(model), source)
    aliases = _tied_names(model)
    palettized: dict[str, PalettizedTensor] = {}
    compensated: Mapping[str, PalettizedTensor] = {}
    if windows is not None and plan:
        frees = (
            consume and streamed_weights(model) is None
        )  # what is read layer by layer is dropped in any case
        ends = palettize_ends(model, plan, vocabulary or {}, windows.numel(), source, advance)
        propagation = Propagation(model, plan, consume=frees, source=source, advance=advance)
        with in_place(model, ends):
            propagation.run(windows)
        begun, compensated = propagation, ends
    if begun is not None:
        compensated, energy = {**compensated, **begun.palettized}, begun.energy
    for module_name, rule in plan.items():
        name = f"{module_name}.weight"
        name = name.removeprefix(".")  # the model is the layer itself
        if module_name in compensated:
            palettized[name] = compensated[module_name]
            if consume:
                release(model, name)
            continue
        module = model.get_submodule(module_name)
        values = values_of(model, name)
        _check_values(name, values, source)
        # A tied embedding is read as the head's weight too, where a channel's energy matters.
        users = [
            module_name,
            *(alias.removesuffix(".weight") for alias, target in aliases.items() if target == name),
        ]
        importance = next((energy[user] for user in users if user in energy), None) if energy else None
        weight = values.t().contiguous() if is_conv1d(module) else values
        del values
        palettized[name] = palettize_weight(name, weight, rule, importance=importance)
        del weight
        if consume:
            release(model, name)
            return_freed_memory()
        if advance is not None:
            advance(module_name, palettized[name].numel)
    left = {name: values_of(model, name) for name, _ in model.named_parameters() if name not in palettized}
    left |= {} if begun is None else begun.dense
    left |= stored_buffers(model)
    dense = {}
    for name, tensor in as_linear(model, left).items():
        _check_values(name, tensor, source)
        dense[name] = compact(tensor)
    return PalettizedModel(palettized, dense, aliases, frozenset(each.name for each in compensated.values()))


def palettize_ends(
    model: Any,
    plan: Mapping[str, Rule],
    hessians: Mapping[str, Tensor],
    samples: int,
    source: str,
    advance: Callable[[str, int], None] | None,
) -> dict[str, PalettizedTensor]:
    """Palettize embedding and output head where they make up for their errors.

    Args:
        model: of transformers.
        plan: {module name: rule}.
        hessians: {module name: float32 [in, in]}, what an error of their rows costs.
        samples: tokens that these were measured on.
        source: name of the model, for messages.
        advance: called with a module's name and a number of weights when these are done.

    Returns:
        {module name: palette}; others are not among them.

    Raises:
        InputError: a weight holds NaN or infinity, or is not floating point.
    """
    made: dict[str, PalettizedTensor] = {}
    for module_name, hessian in hessians.items():
        if module_name not in plan or not makes_up(plan[module_name], len(hessian)):
            continue
        name = f"{module_name}.weight"
        values = values_of(model, name)
        _check_values(name, values, source)
        made[module_name] = palettize_vocabulary(
            name,
            values,
            plan[module_name],
            hessian,
            samples=samples,
            advance=None if advance is None else functools.partial(advance, module_name),
        )
    return made


@contextlib.contextmanager
def in_place(model: nn.Module, made: Mapping[str, PalettizedTensor]) -> Iterator[None]:
    """A model in memory whose weights are what palettes {module name: palette} decode to."""
    kept = {name: model.get_submodule(name).get_parameter("weight").data for name in made}
    try:
        for name, tensor in made.items():
            model.get_submodule(name).get_parameter("weight").data = tensor.decode().to(kept[name].device)
        yield
    finally:
        for name, data in kept.items():
            model.get_submodule(name).get_parameter("weight").data = data


def _check_values(name: str, tensor: Tensor, source: str) -> None:
    if tensor.is_meta or not tensor.is_floating_point():
        found = "has no values (it is on the meta device)" if tensor.is_meta else f"is {tensor.dtype}"
        raise InputError(
            f"{source}: {name} {found}, expected floating point; load or dequantize the model first."
        )
    if not all_finite(tensor):
        raise InputError(f"{source}: {name} holds NaN or infinity; the model is broken.")


def compact(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in 16 bits where that changes no value, else in float32."""
    tensor = tensor.detach().cpu()
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype, copy=True)
    return tensor.to(torch.float32, copy=True)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """{further name of a shared parameter: the name that it is stored under}."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return aliases


@torch.no_grad()
def palettize_weight(
    name: str, weight: Tensor, rule: Rule, *, importance: Tensor | None = None
) -> PalettizedTensor:
    """Palettize one weight.

    Args:
        name: of the parameter.
        weight: float [out, in], or [out, in, *kernel] of a convolution; it is clustered on the CPU.
        rule: bits, groups and LUT dtype.
        importance: nonnegative, weight of each column in the k-means error: [in * kernel], or one for each weight
            [out, in * kernel]; None: all the same.

    Returns:
        The weight with the best LUT of each group (eDKM's initialization is k-means as well; here it is exact),
        rounded to the LUT's dtype before weights are assigned to its entries.

    Raises:
        PaletteError: the group size does not divide the rows, or the weight is not finite or has no two axes.
    """
    if weight.dim() < 2 or not weight.numel() or not weight.is_floating_point():
        raise PaletteError(
            f"{name}: is {weight.dtype} {list(weight.shape)}, expected floating point with at least two axes; others "
            "stay dense."
        )
    shape = weight.shape
    weight = weight.detach().cpu().flatten(1)
    out, columns = weight.shape
    check_grouping(name, out, rule.group_size)
    group_size = rule.group_size or out
    groups = out // group_size
    entries = 1 << rule.bits
    grouped = weight.reshape(groups, group_size * columns)
    if importance is not None:
        importance = importance.float().cpu()  # [columns] is repeated for each row of a group
        if importance.dim() == 2:
            importance = importance.reshape(groups, group_size * columns)
    grid = LUT_DTYPES[rule.lut_dtype]
    lut = torch.empty(groups, 1, entries, 1, dtype=grid.storage)
    scale = torch.empty(groups, 1, dtype=torch.float16) if grid.scaled else None
    indices = torch.empty(groups, group_size * columns, dtype=torch.uint8)
    count = max(1, _BLOCK_WEIGHTS // (group_size * columns))  # groups at a time
    for start in range(0, groups, count):
        block = grouped[start : start + count]
        share = importance
        if importance is not None and importance.dim() == 2:
            share = importance[start : start + count]
        centroids, _ = optimal_centroids(block, entries, importance=share)  # [count, entries]
        rounded = round_to_grid(centroids, rule.lut_dtype)
        lut[start : start + count, 0, :, 0] = rounded.lut
        if scale is not None and rounded.scale is not None:
            scale[start : start + count, 0] = rounded.scale
        indices[start : start + count] = hard_assign(block, rounded.values)
    return PalettizedTensor.from_indices(
        name, lut, indices.view(out, columns), shape=shape, lut_scale=scale, lut_dtype=rule.lut_dtype
    )
