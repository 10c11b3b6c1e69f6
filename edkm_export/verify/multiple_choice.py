"""Zero-shot accuracy on multiple-choice questions, from local JSONL files.

Two forms of lines, as in the evaluation sets of MosaicML's LLM Foundry:

    {"query": "Question: ...", "choices": ["...", ...], "gold": 0}
    {"context_options": ["...", ...], "continuation": "...", "gold": 1}

Each choice is scored by the log likelihood of its continuation after its context; the most likely one is the answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.artifact.execution import Execute
from edkm_export.errors import InputError
from edkm_export.text import read_text

__all__ = [
    "Accuracy",
    "ExecuteBatch",
    "Item",
    "Likelihood",
    "accuracy",
    "batched",
    "encode_pair",
    "grade",
    "item_of",
    "load_items",
    "log_likelihoods",
    "one_by_one",
]

ExecuteBatch = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Texts int64 [positions] -> logits float [positions, vocab_size] of each."""

_BATCH_TOKENS = 2048  # logits of 2,048 positions over 50,000 tokens are 400 MB
_QUERY_ENDS = "\nAnswer:"  # as ARC and the like are asked in EleutherAI's harness


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        contexts: what stands before each choice.
        continuations: the choices; each is preceded by a space.
        gold: index of the right one.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Likelihood:
    """Log likelihood of a continuation in nats, and whether greedy decoding would have written it."""

    nats: float
    greedy: bool


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        plain: by log likelihood.
        normalized: by log likelihood per character, which does not prefer short choices.
        items: how many questions.
    """

    plain: float
    normalized: float
    items: int

    def standard_error(self, value: float) -> float:
        """Of one of the two shares: that of a mean of independent yes-or-no answers."""
        return math.sqrt(value * (1 - value) / (self.items - 1)) if self.items > 1 else math.nan


def load_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Read questions, one a line.

    Args:
        path: the JSONL file.
        limit: read only so many.

    Raises:
        InputError: the file cannot be read, or a line is no question.
    """
    path = Path(path)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(items) < limit):
            items.append(_item(f"{path}: line {number}", line))
    if not items:
        raise InputError(f"{path}: holds no questions.")
    return items


def accuracy(
    run: ExecuteBatch | nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    normalized: bool = True,
    context: int | None = None,
) -> tuple[float, float]:
    """Share of right answers and its standard error.

    Args:
        run: a model of transformers, or what `batched` or `one_by_one` gives.
        tokenizer: a tokenizer of transformers.
        items: the questions.
        normalized: score by log likelihood per character instead of the whole.
        context: most tokens of one text; longer ones lose their beginning.
    """
    found = grade(run, tokenizer, items, context=context)
    share = found.normalized if normalized else found.plain
    return share, found.standard_error(share)


def grade(
    run: ExecuteBatch | nn.Module, tokenizer: Any, items: Sequence[Item], *, context: int | None = None
) -> Accuracy:
    """Answer all questions, scored in both ways; arguments as in `accuracy`."""
    pairs = [
        encode_pair(tokenizer, before, f" {choice}")
        for item in items
        for before, choice in zip(item.contexts, item.continuations, strict=True)
    ]
    scores = iter(log_likelihoods(run, pairs, context=context))
    plain = normalized = 0
    for item in items:
        nats = torch.tensor([next(scores).nats for _ in item.continuations], dtype=torch.float64)
        lengths = torch.tensor([max(1, len(choice)) for choice in item.continuations])
        plain += int(nats.argmax()) == item.gold
        normalized += int((nats / lengths).argmax()) == item.gold
    return Accuracy(plain / len(items), normalized / len(items), len(items))


def encode_pair(tokenizer: Any, before: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, cut where the tokens of the context alone end.

    Spaces at the end of the context belong to the continuation: a tokenizer attaches them to the next word. An empty
    context becomes the token that starts a text.
    """
    stripped = before.rstrip()
    continuation, before = before[len(stripped) :] + continuation, stripped
    if not before:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [start], tokenizer(continuation, add_special_tokens=False)["input_ids"]
    whole = tokenizer(before + continuation)["input_ids"]
    first = len(tokenizer(before)["input_ids"])
    return whole[:first], whole[first:]


def log_likelihoods(
    run: ExecuteBatch | nn.Module,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    context: int | None = None,
) -> list[Likelihood]:
    """Score continuations.

    Args:
        run: as in `accuracy`.
        pairs: tokens of context and continuation, neither empty.
        context: most tokens of one text; longer ones lose their beginning.

    Raises:
        InputError: a pair is empty, or a continuation alone is longer than the context.
    """
    execute = batched(run) if isinstance(run, nn.Module) else run
    texts = []
    for before, after in pairs:
        # The last token is only predicted, never fed.
        if not before or not after or (context is not None and len(after) > context):
            raise InputError(
                f"a continuation of {len(after)} tokens after {len(before)}: expected at least one of each, "
                f"and at most {context} to be continued."
            )
        texts.append(torch.tensor([*before, *after])[None if context is None else -(context + 1) :])
    found: list[Likelihood | None] = [None] * len(pairs)
    for batch in _batches([len(text) for text in texts]):
        for place, logits in zip(batch, execute([texts[place][:-1] for place in batch]), strict=True):
            target = torch.tensor(pairs[place][1])
            scores = logits[-len(target) :].float().cpu()
            nats = -nn.functional.cross_entropy(scores, target, reduction="sum")
            found[place] = Likelihood(float(nats), bool((scores.argmax(-1) == target).all()))
    return [score for score in found if score is not None]


def batched(model: Any) -> ExecuteBatch:
    """Run a model of transformers on several texts at once, padded on the right, where causal models do not look."""

    @torch.no_grad()
    def execute(texts: Sequence[Tensor]) -> list[Tensor]:
        padded = nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(model.device)
        logits = model(input_ids=padded, use_cache=False).logits
        return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]

    return execute


def one_by_one(execute: Execute) -> ExecuteBatch:
    """Run an artifact on one text after the other."""
    return lambda texts: [execute(text) for text in texts]


def _batches(lengths: Sequence[int]) -> Iterable[list[int]]:
    """Places of texts that go together: similar lengths, at most `_BATCH_TOKENS` with their padding."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _item(where: str, line: str) -> Item:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where}: is {type(fields).__name__}, expected an object.")
    return item_of(where, fields)


def item_of(where: str, fields: dict[str, Any]) -> Item:
    """A question from the fields of a line.

    Raises:
        InputError: it is none.
    """
    gold = fields.get("gold")
    if _texts(fields.get("choices")) and isinstance(fields.get("query"), str):
        continuations = tuple(fields["choices"])
        contexts = (fields["query"] + _QUERY_ENDS,) * len(continuations)
    elif _texts(fields.get("context_options")) and isinstance(fields.get("continuation"), str):
        contexts = tuple(fields["context_options"])
        continuations = (fields["continuation"],) * len(contexts)
    else:
        raise InputError(
            f"{where}: has {', '.join(map(str, fields)) or 'no fields'}; expected `query` and `choices`, or "
            "`context_options` and `continuation`."
        )
    if type(gold) is not int or not 0 <= gold < len(contexts):
        raise InputError(f"{where}: gold is {gold!r}, expected 0 to {len(contexts) - 1}.")
    return Item(contexts, continuations, gold)


def _texts(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) and one for one in value)
