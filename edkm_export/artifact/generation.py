"""Writing text, token by token, with any model that keeps a cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edkm_export.activity import activity, tracked
from edkm_export.artifact.protocol import Session
from edkm_export.artifact.thresholds import NEAR_TIE_NATS
from edkm_export.errors import InputError
from edkm_export.token_ids import Ids, as_ids

__all__ = [
    "GREEDY",
    "Choice",
    "Difference",
    "Generation",
    "Sampling",
    "first_difference",
    "generate",
]

Finish = Literal["stop", "told", "length", "context"]

_PREFILL = 256  # tokens fed at once: logits of a whole long prompt would take hundreds of megabytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken from a distribution.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_p: only the most likely tokens that together reach this probability are drawn from
            (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the drawing.

    Raises:
        InputError: a value makes no sense.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; use 0 (most likely token) or above.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}; use a probability above 0, at most 1.")


GREEDY = Sampling()


@dataclass(frozen=True)
class Choice:
    """One token of a generated text, and what it was chosen against.

    Attributes:
        token: the token.
        best: the two most likely tokens.
        probabilities: theirs, before temperature.
        gap_nats: logarithm of their ratio.
    """

    token: int
    best: tuple[int, int]
    probabilities: tuple[float, float]
    gap_nats: float

    @property
    def near_tie(self) -> bool:
        """True when rounding may decide which of the two comes first."""
        return self.gap_nats <= NEAR_TIE_NATS


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        choices: its tokens.
        finish: why it ended: a stop token (which is not among the choices), `on_token`, as many tokens as asked for,
            or a context without room for another.
        prompt_tokens: length of the prompt.
        prefill_s: seconds from the prompt to its logits.
        decode_s: seconds for everything after.
    """

    choices: tuple[Choice, ...]
    finish: Finish
    prompt_tokens: int
    prefill_s: float
    decode_s: float

    def __repr__(self) -> str:
        """One line: tokens, why it ended, speed."""
        rate = f", {len(self.choices) / self.decode_s:.1f} tokens/s" if self.decode_s > 0 else ""
        return (
            f"Generation({len(self.choices)} tokens after {self.prompt_tokens}, ended by {self.finish}{rate})"
        )

    @property
    def tokens(self) -> list[int]:
        """The generated tokens."""
        return [choice.token for choice in self.choices]

    @property
    def read(self) -> list[int]:
        """The generated tokens that the session has read: all that were followed by another choice."""
        return self.tokens if self.finish == "stop" else self.tokens[:-1]

    @property
    def near_ties(self) -> list[int]:
        """Positions in `choices` where the two best tokens are nearly equally likely."""
        return [place for place, choice in enumerate(self.choices) if choice.near_tie]


@dataclass(frozen=True)
class Difference:
    """Where two greedy texts part.

    Attributes:
        place: position in the generated tokens.
        reference: what the first text chose there, None when it had ended.
        candidate: what the second one chose, likewise.
    """

    place: int
    reference: Choice | None
    candidate: Choice | None

    @property
    def near_tie(self) -> bool:
        """True when the reference holds both tokens nearly equally likely, so that neither is wrong."""
        return self.within(NEAR_TIE_NATS)

    def within(self, nats: float) -> bool:
        """True when these are the two best tokens of the reference, and no further apart than so much."""
        if self.reference is None or self.candidate is None or self.reference.gap_nats > nats:
            return False
        return {self.reference.token, self.candidate.token} == set(self.reference.best)


def first_difference(reference: Sequence[Choice], candidate: Sequence[Choice]) -> Difference | None:
    """Compare two greedy texts from the same prompt; None when all tokens are equal.

    After the first difference the texts go their own ways, and nothing is comparable.
    """
    for place in range(max(len(reference), len(candidate))):
        ours = reference[place] if place < len(reference) else None
        theirs = candidate[place] if place < len(candidate) else None
        if ours is None or theirs is None or ours.token != theirs.token:
            return Difference(place, ours, theirs)
    return None


def generate(
    session: Session,
    prompt: Ids,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    on_token: Callable[[int], bool | None] | None = None,
    cached: int = 0,
) -> Generation:
    """Write on after a prompt.

    Args:
        session: the model; its text is forgotten first, unless `cached` says otherwise.
        prompt: ids [tokens], in any form that `as_ids` takes; at least one, at most as many as the context holds.
        max_new_tokens: at most this many tokens, at least 1.
        sampling: how tokens are chosen.
        stop: tokens that end the text.
        on_token: called with each token that does not end the text, as soon as it is known; true ends the text.
        cached: so many tokens of the prompt the session has read already, fewer than all.

    Raises:
        InputError: the prompt is empty or does not fit, or a logit is not finite.
    """
    ids = as_ids(prompt, "the prompt")
    if len(ids) > session.context:
        raise InputError(
            f"the prompt has {len(ids):,} tokens, but the context holds {session.context:,}; shorten it."
        )
    if max_new_tokens < 1:
        raise InputError(f"{max_new_tokens} new tokens were asked for; use at least 1.")
    if not cached:
        session.reset()
    generator = torch.Generator().manual_seed(sampling.seed)
    started = time.perf_counter()
    logits = torch.empty(0)
    for start in tracked(range(cached, len(ids), _PREFILL), "reading the prompt", "parts"):
        logits = session.feed(ids[start : start + _PREFILL])
    prefilled = time.perf_counter()
    choices: list[Choice] = []
    finish: Finish
    with activity("writing", max_new_tokens, "tokens") as writing:
        while True:
            choice = _choose(logits[-1], sampling, generator)
            if choice.token in stop:
                finish = "stop"
                break
            choices.append(choice)
            writing.advance()
            if on_token is not None and on_token(choice.token):
                finish = "told"
                break
            if len(choices) == max_new_tokens:
                finish = "length"
                break
            if len(ids) + len(choices) > session.context:
                finish = "context"
                break
            logits = session.feed(torch.tensor([choice.token]))
    ended = time.perf_counter()
    return Generation(tuple(choices), finish, len(ids), prefilled - started, ended - prefilled)


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Choice:
    """Take a token; logits float [vocab_size]."""
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model gives a logit that is not finite; the artifact is damaged, verify it.")
    log_p = logits.double().log_softmax(-1)
    values, tokens = log_p.topk(min(2, len(log_p)))
    first, second = int(tokens[0]), int(tokens[-1])
    if sampling.temperature == 0:
        token = first
    else:
        token = _draw(logits.double() / sampling.temperature, sampling.top_p, generator)
    high, low = float(values[0]), float(values[-1])
    return Choice(token, (first, second), (math.exp(high), math.exp(low)), high - low)


def _draw(logits: Tensor, top_p: float, generator: torch.Generator) -> int:
    """Draw from the nucleus; logits float64 [vocab_size]."""
    probabilities, tokens = logits.softmax(-1).sort(descending=True)
    # A token belongs to the nucleus when those before it have not reached top_p; the first one always does.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[0] = False
    nucleus = probabilities.masked_fill(outside, 0)
    return int(tokens[torch.multinomial(nucleus, 1, generator=generator)])
