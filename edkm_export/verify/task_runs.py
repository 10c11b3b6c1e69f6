"""Answers to tasks: of models of transformers, and of an artifact held against hard PyTorch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.artifact.execution import Execute
from edkm_export.artifact.generation import Choice, Difference, first_difference, generate
from edkm_export.artifact.protocol import Session
from edkm_export.checkpoint import Checkpoint
from edkm_export.end_tokens import stored_end_tokens
from edkm_export.errors import EdkmExportError, InputError, PackageError
from edkm_export.prompt import encode_prompt
from edkm_export.reference.streamed_model import run_all, streamed_weights
from edkm_export.reference.torch_session import TorchSession
from edkm_export.token_ids import Ids, as_ids
from edkm_export.verify.multiple_choice import encode_pair, log_likelihoods, one_by_one
from edkm_export.verify.task_grading import is_right
from edkm_export.verify.tasks import GenerationItem, Task
from edkm_export.verify.time_budget import UNLIMITED, Share
from edkm_export.verify.torch_runs import transformers_model

__all__ = ["Answer", "Question", "answers_of", "artifact_answers", "questions_of"]


@dataclass(frozen=True)
class Question:
    """An item as a model reads it.

    Attributes:
        task: what it belongs to.
        number: its place in the task, from 1 on.
        item: of a generated answer; None: of choices.
        ids: tokens up to where the answer begins, int64 [tokens]; of choices empty.
        pairs: tokens of context and continuation of each choice.
        gold: the right choice.
        ends: tokens that end an answer.
        stops: texts that end one.
        shown: what is asked, for people.
    """

    task: str
    number: int
    item: GenerationItem | None
    ids: Tensor
    pairs: tuple[tuple[list[int], list[int]], ...]
    gold: int
    ends: frozenset[int]
    stops: tuple[str, ...]
    shown: str

    @property
    def length(self) -> int:
        """Positions that it takes with its answer."""
        if self.item is not None:
            return len(self.ids) + self.item.max_new_tokens
        return max(len(before) + len(after) for before, after in self.pairs)


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: its answer, without what ended it.
        right: whether that is right.
        choices: tokens of a generated answer, with that which ended it.
        nats: log likelihood of each choice.
    """

    text: str
    right: bool
    choices: tuple[Choice, ...] = ()
    nats: tuple[float, ...] = ()


def questions_of(
    tasks: Iterable[Task], checkpoint: Checkpoint, tokenizer: Any, context: int
) -> tuple[list[Question], dict[str, int]]:
    """Put items into tokens.

    A generated answer follows the chat template of the tokenizer; without one the turns stand as they are, each in a
    line of its own, and an answer is a line. Tools are given to a template that takes them, else described before what
    the user says first.

    Returns:
        The items that fit, and how many of each task are too long for so many positions.

    Raises:
        InputError: the template refuses an item, or a token is beyond the vocabulary.
    """
    where = str(checkpoint.path or "checkpoint")
    ends = frozenset(stored_end_tokens(checkpoint.config, checkpoint.tokenizer))
    vocabulary = int(checkpoint.config.get("vocab_size", 0))
    found: list[Question] = []
    long: dict[str, int] = {}
    for task in tasks:
        for number, item in enumerate(task.items, start=1):
            named = f"{where}: item {number} of task {task.name!r}"
            if isinstance(item, GenerationItem):
                text, chat = _written(item, tokenizer, named)
                ids = (
                    encode_prompt(tokenizer, text, chat=False, where=named)
                    if not chat
                    else _bare(tokenizer, text)
                )
                stops = (*item.stop, *(() if chat else ("\n",)))
                one = Question(task.name, number, item, ids, (), 0, ends, stops, item.turns[-1].content)
            else:
                choices = zip(item.contexts, item.continuations, strict=True)
                pairs = tuple(encode_pair(tokenizer, before, f" {choice}") for before, choice in choices)
                if not all(before and after for before, after in pairs):
                    raise InputError(f"{named}: a choice gives no tokens.")
                ids = torch.empty(0, dtype=torch.int64)
                shown = item.contexts[item.gold]
                one = Question(task.name, number, None, ids, pairs, item.gold, ends, (), shown)
            if max(itertools.chain(one.ids.tolist(), *(a + b for a, b in one.pairs))) >= vocabulary:
                raise InputError(
                    f"{named}: its tokenizer gives a token beyond its vocabulary of {vocabulary}."
                )
            if one.length > context:
                long[task.name] = long.get(task.name, 0) + 1
            else:
                found.append(one)
    return found, long


def _written(item: GenerationItem, tokenizer: Any, where: str) -> tuple[str, bool]:
    """The text up to the answer, and whether the chat template wrote it."""
    turns = [turn.model_dump() for turn in item.turns]
    template = tokenizer.chat_template
    options: dict[str, Any] = {}
    if item.tools and template and "tools" in str(template):
        options["tools"] = list(item.tools)
    elif item.tools:
        described = "\n".join(json.dumps(tool) for tool in item.tools)
        turns[0]["content"] = f"You may call these functions:\n{described}\n\n{turns[0]['content']}"
    if not template:
        return "".join(f"{turn['content']}\n" for turn in turns), False
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **options
        ), True
    except EdkmExportError:
        raise
    except Exception as error:  # a template is a program, with errors of its own
        raise InputError(f"{where}: its chat template fails: {str(error)[:200]}") from error


def _bare(tokenizer: Any, text: str) -> Tensor:
    """Tokens of what a template wrote, special ones included."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def answers_of(
    model: Any, questions: Sequence[Question], tokenizer: Any, share: Share = UNLIMITED
) -> list[Answer]:
    """Those of a model of transformers to as many questions as there is time for, from the first on."""
    execute = transformers_model(model)

    def one(question: Question) -> Answer:
        if question.item is None:
            return _chosen(execute, question)
        return _generated(TorchSession(model), question, tokenizer)

    if streamed_weights(model) is not None:  # all of them cost what one does
        return list(run_all(model, [partial(one, question) for question in questions]))
    return [one(question) for question in share.within(tracked(questions, "tasks", "items"))]


def artifact_answers(
    execute: Execute,
    session: Session | None,
    context: int,
    hard: Sequence[Answer],
    questions: Sequence[Question],
    tokenizer: Any,
    tie_nats: float,
    share: Share = UNLIMITED,
) -> tuple[list[Answer], list[str]]:
    """Those of an artifact.

    It is fed each prompt with hard PyTorch's answer at once: as long as it would have chosen the same tokens, that is
    its answer. Where it would not, it answers on its own.

    Args:
        execute: of the artifact.
        session: with its cache; None: it has none.
        context: positions that it holds.
        hard: the answers of hard PyTorch.
        questions: at least as many.
        tokenizer: to put tokens into words.
        tie_nats: how near two tokens, or a token's share of two choices, must be for either to be right.
        share: of the time.

    Returns:
        The answers, and in words where they are others than those of hard PyTorch and neither is right by a near tie.

    Raises:
        PackageError: the artifact is at fault.
    """
    found: list[Answer] = []
    faults: list[str] = []
    pairs = list(zip(questions, hard, strict=False))
    for question, expected in share.within(tracked(pairs, "tasks", "items")):
        named = f"item {question.number} of {question.task}"
        if question.item is None:
            answer = _chosen(execute, question)
            if (best := _best(answer.nats)) != (wanted := _best(expected.nats)):
                tokens = max(len(question.pairs[place][1]) for place in (best, wanted))
                if expected.nats[wanted] - expected.nats[best] > tie_nats * tokens:
                    faults.append(f"{named}: chooses {answer.text!r}, hard PyTorch {expected.text!r}")
        else:
            difference = _parting(execute, question, expected)
            answer = expected
            if difference is not None:
                replaying = _Replayed(execute, context)
                answer = _generated(session or replaying, question, tokenizer)
                if not difference.within(tie_nats):
                    place = difference.place + 1
                    faults.append(
                        f"{named}: parts at token {place}, answers {answer.text!r}, hard PyTorch {expected.text!r}"
                    )
        found.append(answer)
    return found, faults


def _generated(session: Session, question: Question, tokenizer: Any) -> Answer:
    item = question.item
    assert item is not None
    made: list[int] = []

    def ended(token: int) -> bool:
        if token in question.ends:
            return True
        made.append(token)
        return any(stop in str(tokenizer.decode(made)).lstrip() for stop in question.stops)

    choices = generate(session, question.ids, max_new_tokens=item.max_new_tokens, on_token=ended).choices
    text = str(tokenizer.decode(made)).lstrip() if made else ""
    cut = min((text.index(stop) for stop in question.stops if stop in text), default=len(text))
    text = text[:cut].strip()
    return Answer(text, is_right(item, text), choices)


def _chosen(execute: Execute, question: Question) -> Answer:
    scores = log_likelihoods(one_by_one(execute), list(question.pairs))
    nats = tuple(score.nats for score in scores)
    best = _best(nats)
    return Answer(f"choice {best + 1}", best == question.gold, nats=nats)


def _best(nats: Sequence[float]) -> int:
    return max(range(len(nats)), key=nats.__getitem__)


def _parting(execute: Execute, question: Question, expected: Answer) -> Difference | None:
    """Where the artifact would not have gone on as hard PyTorch did."""
    tokens = torch.tensor([choice.token for choice in expected.choices])
    logits = execute(torch.cat([question.ids, tokens[:-1]]))[len(question.ids) - 1 :]
    if not bool(torch.isfinite(logits).all()):
        raise PackageError("gives a logit that is not finite.")
    chosen = []
    for row in logits.double().log_softmax(-1):
        (high, low), (first, second) = (values.tolist() for values in row.topk(2))
        chosen.append(
            Choice(first, (first, second), (float(row[first].exp()), float(row[second].exp())), high - low)
        )
    return first_difference(expected.choices, chosen)


class _Replayed:
    """A session of what has no cache: each token runs the whole text again."""

    has_cache = False

    def __init__(self, execute: Callable[[Tensor], Tensor], context: int) -> None:
        self._execute, self.context = execute, context
        self._text = torch.empty(0, dtype=torch.int64)

    def reset(self) -> None:
        self._text = self._text[:0]

    def feed(self, tokens: Ids) -> Tensor:
        ids = as_ids(tokens, "the tokens")
        self._text = torch.cat([self._text, ids])
        return self._execute(self._text)[-len(ids) :]
