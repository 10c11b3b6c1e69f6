"""What palettization cost a model, estimated on a few hundred tokens in seconds.

The original's predictions are kept before its weights are used up, and compared with those of the palettized weights
in the same model of transformers. A verification measures the same with more tokens, of what was exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edkm_export.artifact.metrics import divergence, perplexity, token_losses
from edkm_export.calibration import check_vocabulary, float32_activations
from edkm_export.memory import return_freed_memory
from edkm_export.palette import PalettizedTensor
from edkm_export.reference.conv1d import as_linear, conv1d_weights
from edkm_export.reference.streamed_model import streamed_weights

__all__ = ["ESTIMATE_CONTEXT", "TOLERABLE_RATIO", "LossEstimate", "Predictions", "estimate_tokens"]

ESTIMATE_CONTEXT = 256
"""Tokens of a window."""

TOLERABLE_RATIO = 1.5
"""Perplexity, as a multiple of the original's, above which another way should be tried.

SmolLM2-135M has 1.2 with calibration at 4 bits, and 3 without it or at 3 bits, where training leads to 1.1.
"""

_TOKENS = (
    512  # two windows: KL and the ratio of perplexities, paired token by token, are then good to a tenth
)
_KEPT_VALUES = 1 << 26  # logits kept in float16: 128 MiB
_ROWS = 64  # positions whose logits are compared at a time, in float64


def estimate_tokens(vocabulary: int) -> int:
    """How many tokens an estimate should have: fewer where the logits of each are many."""
    return max(64, min(_TOKENS, _KEPT_VALUES // vocabulary))


@dataclass(frozen=True)
class LossEstimate:
    """How far the palettized model is from the original.

    Attributes:
        tokens: that were read.
        perplexity_original, perplexity_palettized: of the next tokens.
        kl: mean KL(original || palettized) of the next-token distributions, in nats a token.
        top1: share of positions with the same most likely token.
    """

    tokens: int
    perplexity_original: float
    perplexity_palettized: float
    kl: float
    top1: float

    @property
    def ratio(self) -> float:
        """The palettized perplexity as a multiple of the original's."""
        return self.perplexity_palettized / self.perplexity_original

    @property
    def is_tolerable(self) -> bool:
        """Whether it is within `TOLERABLE_RATIO`; what is not finite is not."""
        return self.ratio <= TOLERABLE_RATIO

    def record(self) -> dict[str, Any]:
        """As provenance holds it: five digits, the rest depends on the number of threads; None: not finite."""
        found: dict[str, Any] = {**asdict(self), "perplexity_ratio": self.ratio}
        tokens = found.pop("tokens")
        digits = {
            name: float(f"{value:.5g}") if math.isfinite(value) else None for name, value in found.items()
        }
        return {"tokens": tokens, **digits}


class Predictions:
    """What the original predicts, kept until its palettized weights can be compared with it."""

    def __init__(self, model: Any, windows: Tensor, *, advance: Callable[[], None] | None = None) -> None:
        """Let a model predict.

        Args:
            model: a causal language model of transformers, on the CPU, in any float dtype.
            windows: int64 [windows, context].
            advance: called after each window.

        Raises:
            InputError: a token is beyond the vocabulary.
        """
        check_vocabulary(model, windows)
        self._windows, self._advance = windows, advance
        self._kept: list[Tensor] = []  # float16 [context, vocabulary] of each window
        self._losses: list[Tensor] = []
        for window, logits in self._run(model):
            self._kept.append(logits.half())
            self._losses.append(token_losses(logits, window))

    @torch.no_grad()
    def _run(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Each window [context] and its logits, float32 [context, vocabulary]."""
        with float32_activations(model):
            for window in self._windows:
                yield window, model(input_ids=window[None], use_cache=False).logits[0].float()
                if self._advance is not None:
                    self._advance()

    def compare(
        self,
        model: Any,
        palettized: Mapping[str, PalettizedTensor],
        dense: Mapping[str, Tensor] | None = None,
    ) -> LossEstimate:
        """Put palettized weights into the model that predicted, and let it predict again.

        Args:
            model: the same one; parameters that were palettized are replaced, also where they were freed.
            palettized: by name of the parameter.
            dense: parameters that changed without being palettized, in the model's form.
        """
        dense = dense or {}
        if (weights := streamed_weights(model)) is not None:
            turned = conv1d_weights(model)

            def decode(name: str) -> Tensor | None:
                if name not in palettized:
                    return dense.get(name)
                values = palettized[name].decode()
                return values.t().contiguous() if name in turned else values

            weights.replace(decode)
        else:
            decoded = as_linear(model, {name: tensor.decode() for name, tensor in palettized.items()})
            for name, values in {**decoded, **dense}.items():
                model.get_parameter(name).data = values
        losses: list[Tensor] = []

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for (window, logits), kept in zip(self._run(model), self._kept, strict=True):
                losses.append(token_losses(logits, window))
                for start in range(0, len(logits), _ROWS):
                    yield kept[start : start + _ROWS].float(), logits[start : start + _ROWS]

        found = divergence(pairs())
        return_freed_memory()
        return LossEstimate(
            tokens=self._windows.numel(),
            perplexity_original=perplexity(self._losses).value,
            perplexity_palettized=perplexity(losses).value,
            kl=found.kl_mean,
            top1=found.top1_agreement,
        )
