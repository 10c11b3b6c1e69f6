"""Token by token: prefill against decode, and greedy continuations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.artifact.execution import Execute
from edkm_export.artifact.generation import (
    Choice,
    Difference,
    Generation,
    first_difference,
    generate,
)
from edkm_export.artifact.metrics import Divergence, divergence
from edkm_export.artifact.protocol import Artifact, Holding, Session
from edkm_export.artifact.thresholds import EXECUTION, NEAR_TIE_NATS, ROUNDED_TIE_NATS
from edkm_export.errors import InputError, PackageError
from edkm_export.kv_cache import FLOAT, KVCache
from edkm_export.reference.streamed_model import run_all, streamed_weights
from edkm_export.reference.torch_session import TorchSession
from edkm_export.verify.held_keys import Reader
from edkm_export.verify.quoting import quoted
from edkm_export.verify.report import PromptTexts
from edkm_export.verify.time_budget import DECODED, UNLIMITED, Share

__all__ = [
    "Continuation",
    "HardTexts",
    "compare_continuations",
    "hard_against_decode",
    "prefill_against_decode",
    "side_by_side",
    "tie_limit",
]


@dataclass(frozen=True)
class Continuation:
    """A prompt and what came of it.

    Attributes:
        prompt: the prompt.
        tokens: its greedy continuation by hard PyTorch.
        text: the same as text.
        wanted: how many tokens that are.
        equal: how many of them the artifact gives too, before the texts part.
        difference: where they part; None: nowhere.
        tie_nats: how near two tokens must be for either to be right.
        found: the token of the artifact there, in words.
        expected: that of hard PyTorch.
    """

    prompt: str
    tokens: tuple[int, ...]
    text: str
    wanted: int
    equal: int
    difference: Difference | None
    tie_nats: float = NEAR_TIE_NATS
    found: str = ""
    expected: str = ""

    @property
    def ok(self) -> bool:
        """Equal, or parted at a near tie."""
        return self.difference is None or self.difference.within(self.tie_nats)

    def measures(self) -> dict[str, Any]:
        """The same for report.json."""
        known: dict[str, Any] = {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.wanted,
            "equal_tokens": self.equal,
            "parted": None,
        }
        if self.difference is not None:
            known["parted"] = {
                "found": self.found,
                "expected": self.expected,
                "near_tie": self.ok,
                "hard_pytorch": _best(self.difference.reference),
                "artifact": _best(self.difference.candidate),
            }
        return known

    def __str__(self) -> str:
        """Where the texts part; nothing when they do not."""
        if self.difference is None:
            return ""
        reference = self.difference.reference
        assert reference is not None  # the candidate never goes on beyond the reference
        first, second = reference.probabilities
        near = ", a near tie" if self.ok else ""
        return (
            f"after {quoted(self.prompt)}, token {self.equal + 1} is {quoted(self.found)}, hard PyTorch has "
            f"{quoted(self.expected)} (its two best have probabilities {first:.4f} and {second:.4f}{near})"
        )


def side_by_side(
    palettized: Sequence[Continuation], original: Mapping[str, Sequence[int]], tokenizer: Any
) -> list[PromptTexts]:
    """The original's and the palettized model's continuation of each prompt.

    Args:
        palettized: of the rung, whose reference is hard PyTorch.
        original: tokens of the original by prompt.
        tokenizer: to put tokens into words.
    """
    found = []
    for one in palettized:
        theirs = None if one.prompt not in original else list(original[one.prompt][: one.wanted])
        pairs = zip(theirs or (), one.tokens, strict=False)
        found.append(
            PromptTexts(
                prompt=one.prompt,
                tokens=one.wanted,
                original=None if theirs is None else tokenizer.decode(theirs),
                palettized=one.text,
                shared_tokens=None
                if theirs is None
                else sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)),
            )
        )
    return found


def prefill_against_decode(session: Session, tokens: Tensor, share: Share = UNLIMITED) -> Divergence:
    """Feed a text at once, then token by token.

    Args:
        session: of the artifact.
        tokens: int64 [positions]; the first `DECODED` of them are used, or as many as there is time for.
        share: of the time.
    """
    text = tokens[: min(DECODED, session.context)]
    session.reset()
    prefill = session.feed(text).clone()
    session.reset()
    decoded = share.within(tracked(text, "decoding", "tokens"))
    decode = torch.cat([session.feed(token[None]).clone() for token in decoded])
    return divergence([(prefill[: len(decode)], decode)])


def hard_against_decode(
    session: Holding, reader: Reader, tokens: Tensor, share: Share = UNLIMITED
) -> Divergence:
    """Feed a text token by token, and let hard PyTorch read the keys and values that are held of it at once.

    Args:
        session: of the artifact.
        reader: hard PyTorch.
        tokens: int64 [positions]; as many are used as by `prefill_against_decode`.
        share: of the time.
    """
    text = tokens[: min(DECODED, session.context)]
    session.reset()
    decode = torch.cat(
        [session.feed(token[None]).clone() for token in share.within(tracked(text, "decoding", "tokens"))]
    )
    return divergence([(reader.read(text[: len(decode)], session.held()), decode)])


def compare_continuations(
    artifact: Artifact,
    session: Session | None,
    hard: Any,
    tokenizer: Any,
    prompts: Mapping[str, Tensor],
    count: int,
    share: Share = UNLIMITED,
    tie_nats: float = NEAR_TIE_NATS,
    reader: Reader | None = None,
) -> list[Continuation]:
    """Continue each prompt greedily, in hard PyTorch and in the artifact.

    What an artifact with int8 keys and values writes is compared, token by token, with what hard PyTorch chooses that
    reads them; texts of two sound computations soon part.

    Without a cache the artifact is fed the prompt with hard PyTorch's continuation at once. Up to the first position
    at which it would have chosen another token, that is the same as generating.

    Args:
        artifact: what can be run.
        session: of the artifact, if it has a cache.
        hard: the model of transformers, or what it wrote already.
        tokenizer: to put tokens into words.
        prompts: int64 [length] by prompt.
        count: tokens to add to each, as far as the context allows.
        share: of the time; prompts that it does not reach are missing in the result.
        tie_nats: how near two tokens must be for either to be right.
        reader: hard PyTorch, of an artifact whose session is `Holding`.

    Raises:
        PackageError: the artifact is at fault.
    """
    execute = None if session is not None else artifact.executions[0].execute
    context = artifact.context if session is None else session.context
    found = []
    texts = hard if isinstance(hard, HardTexts) else HardTexts(hard, prompts)
    lengths = {prompt: min(count, context - len(ids)) for prompt, ids in prompts.items()}
    for prompt, ids in share.within(tracked(prompts.items(), "continuing", "prompts")):
        wanted = lengths[prompt]
        expected = texts.of(prompt, lengths)
        tokens = torch.tensor(expected.tokens)
        if session is not None:
            chosen = _generate(session, ids, wanted)
        else:
            assert execute is not None
            chosen = _choices(execute, ids, tokens)
        right = expected.choices
        if reader is not None:
            held: Any = session
            told = torch.tensor([choice.token for choice in chosen])
            right = _rows(reader.read(torch.cat([ids, told[:-1]]), held.held())[len(ids) - 1 :])
        difference = first_difference(right, chosen)
        one = Continuation(
            prompt=prompt,
            tokens=tuple(expected.tokens),
            text=tokenizer.decode(tokens),
            wanted=wanted,
            equal=wanted if difference is None else difference.place,
            difference=difference,
            tie_nats=tie_nats,
            found=_word(tokenizer, None if difference is None else difference.candidate),
            expected=_word(tokenizer, None if difference is None else difference.reference),
        )
        found.append(one)
    return found


def tie_limit(artifact: Artifact, *, rounded: bool = False) -> float:
    """How near two tokens must be for either to be right, in nats; wider where an execution rounds."""
    coarse = artifact.executions[0].threshold.median_kl > EXECUTION["float32"].median_kl
    return ROUNDED_TIE_NATS if rounded or coarse else NEAR_TIE_NATS


class HardTexts:
    """What hard PyTorch writes after each prompt, made once; together where the model reads its weights as it runs.

    Args:
        model: hard PyTorch.
        prompts: int64 [length] by prompt.
        kv_cache: how it holds keys and values.
    """

    def __init__(self, model: Any, prompts: Mapping[str, Tensor], kv_cache: KVCache = FLOAT) -> None:
        self._model, self._prompts, self._kv_cache = model, prompts, kv_cache
        self._made: dict[tuple[str, int], Generation] = {}

    def of(self, prompt: str, lengths: Mapping[str, int]) -> Generation:
        """The continuation of a prompt.

        Args:
            prompt: the prompt.
            lengths: tokens that each of the prompts is continued by.
        """
        if (prompt, lengths[prompt]) not in self._made:
            wanted = [prompt] if streamed_weights(self._model) is None else list(lengths)
            made = run_all(self._model, [partial(self._generate, one, lengths[one]) for one in wanted])
            self._made.update(zip(((one, lengths[one]) for one in wanted), made, strict=True))
        return self._made[prompt, lengths[prompt]]

    def _generate(self, prompt: str, count: int) -> Generation:
        session = TorchSession(self._model, kv_cache=self._kv_cache)
        return generate(session, self._prompts[prompt], max_new_tokens=count)


def _generate(session: Session, prompt: Tensor, count: int) -> tuple[Choice, ...]:
    try:
        return generate(session, prompt, max_new_tokens=count).choices
    except InputError as error:  # the prompt fits, so the logits are to blame
        raise PackageError(str(error)) from error


def _choices(execute: Execute, prompt: Tensor, expected: Tensor) -> tuple[Choice, ...]:
    """What the artifact chooses after the prompt and each part of the expected continuation."""
    return _rows(execute(torch.cat([prompt, expected[:-1]]))[len(prompt) - 1 :])


def _rows(logits: Tensor) -> tuple[Choice, ...]:
    """The greedy choice at each position of logits [positions, vocab_size]."""
    if not bool(torch.isfinite(logits).all()):
        raise PackageError("gives a logit that is not finite.")
    chosen = []
    for row in logits.double().log_softmax(-1):
        (high, low), (first, second) = (values.tolist() for values in row.topk(2))
        probabilities = (float(row[first].exp()), float(row[second].exp()))
        chosen.append(Choice(first, (first, second), probabilities, high - low))
    return tuple(chosen)


def _word(tokenizer: Any, choice: Choice | None) -> str:
    return "" if choice is None else str(tokenizer.decode([choice.token]))


def _best(choice: Choice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    return {"tokens": list(choice.best), "probabilities": list(choice.probabilities)}
