"""Fits a palettized layer of the stack to what the float one makes: indices, LUTs and norms together.

Master weights and LUTs take gradient steps and indices follow, as in a training run, but the loss is the squared error
of the layer's own output (BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516): nothing but one layer is in the
optimizer, and no label is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edkm_export.training.layer_block import LayerBlock
from edkm_export.training.optimizer import build_optimizer, rate_at
from edkm_export.training.output_importance import OutputWeights, relative_scale
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.surgery import attach, clusters_of
from edkm_export.training.train_config import TrainConfig

__all__ = ["BlockData", "FitSettings", "fit_block"]


@dataclass(frozen=True)
class FitSettings:
    """How a layer is fitted.

    Attributes:
        steps: of the optimizer.
        batch: windows of a step.
        rates: multiplies the learning rates of `weight_rate`.
        norms: train norms and biases, too.
        weighs: how errors are weighed, see `OutputWeights`.
        seed: of the order of the windows, and of the labels that weigh errors.
    """

    steps: int
    batch: int
    rates: float = 1.0
    norms: bool = True
    weighs: OutputWeights = "full"
    seed: int = 0

    def with_steps(self, steps: int) -> FitSettings:
        """The same with another number of steps."""
        return replace(self, steps=steps)

    def config(self, bits: int) -> TrainConfig:
        """Learning rates for weights of so many bits: those of the presets of training."""
        rate = self.rates * 1e-3 * 2.0 ** max(0, min(2, 4 - bits))
        return TrainConfig(
            steps=self.steps, weight_rate=rate, lut_rate=rate, norm_rate=self.rates * 1e-3, warmup=0.05,
            final_rate=0.0, decay="cosine",
        )  # fmt: skip


@dataclass(frozen=True)
class BlockData:
    """What a layer is fitted on.

    Attributes:
        inputs: float32 [windows, context, width]: what the palettized layers before it make.
        targets: what the float layer makes of the float layers before it, of the same shape.
        weights: what errors, as shares of the token's root mean square, are multiplied by: [width], or
            [width, width]; None: by one.
        relative: whether errors are such shares; otherwise they are what they are, and `weights` is None.
        held_out: the last windows, which are not trained on.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None
    relative: bool
    held_out: int

    @property
    def trained(self) -> int:
        """Windows that are trained on."""
        return len(self.inputs) - self.held_out

    def loss(self, block: LayerBlock, rows: Tensor) -> Tensor:
        """What the errors of a layer's output cost on some windows, int64 [windows], in the mean over their tokens.

        With weights it is an estimate of the KL divergence in nats, q, of which log(1 + q) is taken: a token whose
        prediction is lost has nothing left to lose, and must not outweigh all others.
        """
        target = self.targets[rows]
        error = block(self.inputs[rows], rows) - target
        if self.relative:
            error = error * relative_scale(target)
        if self.weights is not None:
            error = error @ self.weights if self.weights.dim() == 2 else error * self.weights
            return (error.square().sum(-1) / 2).log1p().mean()
        return error.square().mean()

    @torch.no_grad()
    def held_out_loss(self, block: LayerBlock, batch: int) -> float:
        """The loss on windows that are not trained on."""
        total = 0.0
        for rows in torch.split(torch.arange(self.trained, len(self.inputs)), batch):
            total += float(self.loss(block, rows)) * len(rows)
        return total / self.held_out


def fit_block(
    block: LayerBlock, data: BlockData, settings: FitSettings, *, advance: Callable[[int], None] | None = None
) -> tuple[float, float]:
    """Train the palettized modules of a layer; they are left as they were where that did not help.

    Args:
        block: its module holds palettized layers.
        data: to fit it on.
        settings: how.
        advance: called with the number of windows after each step.

    Returns:
        The loss on the held-out windows before and after.
    """
    module = block.module
    clusters = clusters_of(module)
    before = data.held_out_loss(block, settings.batch)
    if not before > 0:
        return before, before
    start = copy.deepcopy(module.state_dict())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(settings.norms or ".clusters." in f".{name}")
    config = settings.config(min((each.rule.bits for each in clusters.values()), default=4))
    optimizer = build_optimizer(module, config)
    attach(module, optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    batch = ClusterBatch(list(clusters.values()))
    batch.defer()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    order = _Order(data.trained, settings)
    for step in range(settings.steps):
        factor = rate_at(config, step / settings.steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        rows = order.next()
        batch.refresh()
        with torch.enable_grad():
            torch.autograd.backward(data.loss(block, rows) / before)
        batch.gradients()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if advance is not None:
            advance(len(rows))
    module.requires_grad_(False)
    batch.refresh()
    after = data.held_out_loss(block, settings.batch)
    if not after < before:  # NaN is no less
        module.load_state_dict(start)
        for each in clusters.values():
            each.restored()
    return before, after


class _Order:
    """Windows of each step: all of them in a random order, again and again."""

    def __init__(self, windows: int, settings: FitSettings) -> None:
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._windows, self._batch = windows, min(windows, settings.batch)
        self._left = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        """int64 [windows of a step]."""
        if len(self._left) < self._batch:
            self._left = torch.randperm(self._windows, generator=self._generator)
        rows, self._left = self._left[: self._batch], self._left[self._batch :]
        return rows
