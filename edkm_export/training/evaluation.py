"""How good a model is on a text, and how far it is from the original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.artifact.metrics import divergence, perplexity, token_losses

__all__ = ["Evaluation", "Evaluations", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Measures on one text.

    Attributes:
        perplexity: of the next tokens.
        standard_error: of the perplexity.
        kl: mean KL(original || model) of the next-token distributions in nats, None without an original.
        top1: share of positions with the same most likely token, None without an original.
        tokens: positions that were predicted.
    """

    perplexity: float
    standard_error: float
    kl: float | None
    top1: float | None
    tokens: int


@torch.no_grad()
def evaluate(
    model: Any, windows: Tensor, original: Any | None = None, *, advance: Callable[[], None] | None = None
) -> Evaluation:
    """Evaluate in the precision of the model's parameters; windows count independently.

    Args:
        model: a causal language model of transformers.
        windows: int64 [windows, context].
        original: the model to compare with.
        advance: called after each window.
    """
    losses: list[Tensor] = []
    device = next(model.parameters()).device

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for window in tracked(windows, "evaluation text", "windows"):
            ids = window.to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            losses.append(token_losses(logits, ids).cpu())
            known = (
                logits
                if original is None
                else original(input_ids=ids[None], use_cache=False).logits[0].float()
            )
            if advance is not None:
                advance()
            yield known, logits

    with _eval_mode(model):
        found = divergence(pairs()) if original is not None else None
        if found is None:
            for _ in pairs():
                pass
    text = perplexity(losses)
    return Evaluation(
        text.value,
        text.standard_error,
        None if found is None else found.kl_mean,
        None if found is None else found.top1_agreement,
        text.tokens,
    )


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Evaluations:
    """What a run measures at its stages: the same texts each time, against the same original.

    Attributes:
        texts: {name: windows int64 [windows, context]}; none: nothing is measured.
        original: the float model that others are compared with; set before the first of them.
        found: {name: {stage: Evaluation}}.
    """

    def __init__(
        self,
        texts: Mapping[str, Tensor],
        log: Callable[[dict[str, Any]], None],
        announce: Callable[[str], None],
    ) -> None:
        """`log` is called with a record of each evaluation."""
        self.texts, self.original = texts, None
        self.found: dict[str, dict[str, Evaluation]] = {}
        self._log, self._announce = log, announce

    def measure(self, model: Any, stage: str, step: int) -> None:
        """Evaluate on all texts, and log it."""
        if not self.texts:
            return
        self._announce(f"evaluating, {stage}")
        for name, windows in self.texts.items():
            found = evaluate(model, windows, None if model is self.original else self.original)
            self.found.setdefault(name, {})[stage] = found
            self._log({"step": step, "stage": stage, "text": name, **asdict(found)})
