"""Random numbers: of the right distribution, but not those that a device draws.

An op with a seed of its own draws the same in each run; the others share the generator of the run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.registry import Call, UnsupportedForm, op


def _generator(call: Call, seed: int) -> torch.Generator:
    if seed >= 0:
        return torch.Generator().manual_seed(seed)
    assert call.generator is not None
    return call.generator


def _uniform(shape: list[int], call: Call, seed: int) -> Tensor:
    require_computable(shape)
    return torch.rand(shape, generator=_generator(call, seed))


@op("random_uniform", draws=True)
def random_uniform(
    shape: list[int], call: Call, low: float = 0.0, high: float = 1.0, seed: int = -1
) -> Tensor:
    """Evenly distributed in [low, high)."""
    return low + (high - low) * _uniform(shape, call, seed)


@op("random_normal", draws=True)
def random_normal(
    shape: list[int], call: Call, mean: float = 0.0, stddev: float = 1.0, seed: int = -1
) -> Tensor:
    """Normally distributed."""
    require_computable(shape)
    return mean + stddev * torch.randn(shape, generator=_generator(call, seed))


@op("random_bernoulli", draws=True)
def random_bernoulli(shape: list[int], call: Call, prob: float = 0.5, seed: int = -1) -> Tensor:
    """One with probability `prob`, else zero."""
    return (_uniform(shape, call, seed) < prob).float()


@op("random_categorical", draws=True)
def random_categorical(x: Tensor, call: Call, mode: str = "logits", size: int = 1, seed: int = -1) -> Tensor:
    """Classes of the last axis, drawn with replacement."""
    if mode not in ("logits", "probs"):
        raise UnsupportedForm(f"mode {mode!r}")
    require_computable([*x.shape[:-1], size])
    weights = torch.softmax(x.float(), -1) if mode == "logits" else x.float()
    drawn = torch.multinomial(
        weights.reshape(-1, x.shape[-1]), size, replacement=True, generator=_generator(call, seed)
    )
    return drawn.reshape(*x.shape[:-1], size).float()
