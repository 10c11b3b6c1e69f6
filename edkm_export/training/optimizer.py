"""Adam with a rate for each kind of parameter, and the schedule of the rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from edkm_export.training.bit_budget import TRAINED_BELOW
from edkm_export.training.narrow_moments import NarrowMoments
from edkm_export.training.palettized.surgery import clusters_of
from edkm_export.training.train_config import TrainConfig

__all__ = ["build_optimizer", "freeze", "rate_at", "sizes_of"]

_BETAS = (0.9, 0.95)


def rate_at(config: TrainConfig, share: float) -> float:
    """Factor on the learning rates when `share` of the run is done."""
    if share < config.warmup:
        return max(share / config.warmup, 1e-3)
    left = 1 - (share - config.warmup) / (1 - config.warmup)
    if config.decay == "none":
        return 1.0
    shape = left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return config.final_rate + (1 - config.final_rate) * shape


def freeze(model: Any, config: TrainConfig) -> None:
    """Say which parameters are trained."""
    model.requires_grad_(False)
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    modules = dict(model.named_modules())
    for name, clusters in clusters_of(model).items():
        wanted = config.train_embedding
        if wanted is None:
            wanted = clusters.rule.bits < TRAINED_BELOW
        if wanted or id(modules[name]) not in outer:
            clusters.weight.requires_grad_(True)
            clusters.lut.requires_grad_(clusters.method.backward != "dkm")
    for name, parameter in model.named_parameters():
        if ".clusters." not in f".{name}" and config.train_norms:
            is_outer = any(
                parameter is own
                for module in modules.values()
                if id(module) in outer
                for own in module.parameters()
            )
            parameter.requires_grad_(bool(config.train_embedding) or not is_outer)


@torch.no_grad()
def sizes_of(model: nn.Module, known: Mapping[str, float]) -> dict[str, float]:
    """Root mean square of each trained parameter that is whole and not known yet, {name: size}."""
    found: dict[str, float] = {}
    luts = {id(clusters.lut) for clusters in clusters_of(model).values()}
    for name, parameter in model.named_parameters():
        is_whole = not isinstance(parameter, DTensor) and not parameter.is_meta
        if parameter.requires_grad and is_whole and name not in known and id(parameter) not in luts:
            found[name] = float(parameter.detach().float().square().mean().sqrt())
    return found


def build_optimizer(
    model: nn.Module, config: TrainConfig, sizes: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW without decay. Rates of weights are shares of their root mean square, rounded to powers of two.

    LUTs are held in units of their own size already. Weights of like size share a group, for fused kernels.

    Args:
        model: palettized.
        config: settings.
        sizes: root mean squares by parameter name, of a model in shares; None: they are taken here.
    """
    known = sizes_of(model, {}) if sizes is None else sizes
    size_of = {id(parameter): known.get(name) for name, parameter in model.named_parameters()}

    def scale_of(parameter: nn.Parameter) -> float:
        size = size_of[id(parameter)]
        return 2.0 ** round(math.log2(size)) if size else 1.0

    groups: dict[float, list[nn.Parameter]] = {}
    luts: list[nn.Parameter] = []
    masters: set[int] = set()
    for clusters in clusters_of(model).values():
        masters |= {id(clusters.weight), id(clusters.lut)}
        if clusters.weight.requires_grad:
            groups.setdefault(scale_of(clusters.weight), []).append(clusters.weight)
        if clusters.lut.requires_grad:
            luts.append(clusters.lut)
    others = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in masters
    ]
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": config.weight_rate * scale, "narrow": True}
        for scale, parameters in sorted(groups.items())
    ]
    if luts:
        settings.append({"params": luts, "lr": config.lut_rate, "narrow": False})
    by_size: dict[float, list[nn.Parameter]] = {}
    for parameter in others:
        by_size.setdefault(scale_of(parameter), []).append(parameter)
    settings += [
        {"params": found, "lr": config.norm_rate * scale, "narrow": False}
        for scale, found in sorted(by_size.items())
    ]
    on_cuda = next(model.parameters()).device.type == "cuda"
    if config.moments != "float32" or config.masters != "float32":
        return NarrowMoments(settings, config.moments, _BETAS, on_cuda=on_cuda)
    for group in settings:
        del group["narrow"]
    return torch.optim.AdamW(settings, betas=_BETAS, weight_decay=0.0, fused=on_cuda)
