"""Move activation outliers out of the way: scales folded from a norm into the layers that read it.

A norm's output channel j is divided by s_j (in the norm's weight) and column j of every layer that reads it is
multiplied by s_j. The function stays the same and nothing is added to the graph, so that both exports remain
exact; but weights that meet large activations are now larger, and their clustering error is smaller in
proportion (AWQ, Lin et al. 2023, arXiv 2306.00978, section 3.2, with a search for the exponent).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from edkm_export.activity import tracked
from edkm_export.recipe import Rule
from edkm_export.training.palettized.surgery import Importance, seed_centroids

__all__ = ["fold_scales", "norm_readers"]

_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_GROUPS = 12  # groups of a layer that stand for all of them in the search
_TOLERANCE = 1e-3  # largest change of the logits, of their spread


def norm_readers(model: Any, window: Tensor) -> dict[str, list[str]]:
    """Which linear layers read which norm's output directly: {norm: [layers]}, found by running the model."""
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[str, Tensor]] = {}
    readers: dict[str, list[str]] = {}

    def remember(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[id(output)] = (names[module], output)  # keeps it alive, so that its id stays its own

    def look(module: nn.Module, args: Any) -> None:
        if args and id(args[0]) in made:
            readers.setdefault(made[id(args[0])][0], []).append(names[module])

    hooks = []
    for module in names:
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(look))
        elif "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1:
            hooks.append(module.register_forward_hook(remember))
    try:
        with torch.no_grad():
            model(input_ids=window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return readers


@torch.no_grad()
def fold_scales(
    model: Any,
    window: Tensor,
    plan: Mapping[str, Rule],
    importance: Mapping[str, Importance],
    *,
    advance: Callable[[str], None] | None = None,
    weights: Callable[[str], Tensor] | None = None,
    decide: Callable[[Callable[[], Any]], Any] = lambda task: task(),
    scales: dict[str, Tensor] | None = None,
) -> dict[str, Importance]:
    """Fold scales in place wherever that lowers the clustering error.

    Args:
        model: float model before its layers are replaced; its layers' matrices may be in shares of their rows.
        window: int64 [context], to find which layers read which norm, and to check that the function is kept.
        plan: {module name: rule} of the layers that will be palettized.
        importance: {module name: importance} of all of them.
        advance: called with each norm's name.
        weights: gives a layer's weight [out, in] as it is without scales; None: the model's.
        decide: calls a function that returns what all processes go by, `Processes.first` for several of them.
        scales: is given what each parameter was multiplied by, {parameter name: float [channels]}.

    Returns:
        The importance of the layers as they are now.
    """
    held = weights or (lambda layer: model.get_submodule(layer).weight.data)
    before = model(input_ids=window[None], use_cache=False).logits.float()
    updated = dict(importance)
    for norm, layers in tracked(norm_readers(model, window).items(), "folding", "norms"):
        if all(layer in plan and layer in importance for layer in layers):
            scale = decide(partial(_best_scale, held, layers, plan, importance))
            if scale is not None:
                _apply(model, norm, layers, scale)
                after = model(input_ids=window[None], use_cache=False).logits.float()
                largest, spread = float((after - before).abs().max()), float(before.std())
                if decide(partial(operator.gt, largest, _TOLERANCE * spread)):
                    _apply(model, norm, layers, 1 / scale)  # a norm of another form, such as (1 + weight) x
                else:
                    for layer in layers:
                        found = importance[layer]
                        updated[layer] = Importance(found.inputs / scale.square(), found.outputs)
                    if scales is not None:
                        own = model.get_submodule(norm).named_parameters(norm, recurse=False)
                        scales |= {name: 1 / scale for name, _ in own}
                        scales |= {f"{layer}.weight": scale for layer in layers}
        if advance is not None:
            advance(norm)
    return updated


def _apply(model: Any, norm: str, layers: Sequence[str], scale: Tensor) -> None:
    for parameter in model.get_submodule(norm).parameters(recurse=False):
        parameter.data.div_(scale.to(parameter.device))
    for layer in layers:
        weight = model.get_submodule(layer).weight.data
        own = weight.to_local() if isinstance(weight, DTensor) else weight  # rows, each with all its columns
        own.mul_(scale.to(own.device))


def _best_scale(
    held: Callable[[str], Tensor],
    layers: Sequence[str],
    plan: Mapping[str, Rule],
    importance: Mapping[str, Importance],
) -> Tensor | None:
    """Scale [channels], rounded to powers of two so that folding is exact in any float type; None for no gain."""
    energy = torch.stack([importance[layer].inputs for layer in layers]).mean(0)
    energy = energy.clamp_min(float(energy.mean()) * 1e-6)
    relative = energy / energy.log().mean().exp()
    best: tuple[float, Tensor | None] = (float("inf"), None)
    weights = {layer: held(layer) for layer in layers}
    for exponent in _EXPONENTS:
        scale = torch.exp2((relative.log2() * (exponent / 2)).round())
        error = 0.0
        for layer in layers:
            rule, found = plan[layer], importance[layer]
            weight = weights[layer]
            rows = rule.group_size or weight.shape[0]
            stride = max(1, weight.shape[0] // rows // _GROUPS)
            picked = torch.arange(weight.shape[0], device=weight.device).view(-1, rows)[::stride].reshape(-1)
            outputs = None if found.outputs is None else found.outputs[picked]
            scaled = Importance(found.inputs / scale.square(), outputs)
            _, squared = seed_centroids(weight[picked] * scale, rule, scaled)
            error += float(squared.sum()) * stride
        if error < best[0] * (1 if best[1] is None else 0.999):
            best = (error, scale if exponent else None)
    return best[1]
