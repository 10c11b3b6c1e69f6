"""Tasks whose answers are right or wrong: JSONL files, and the set that ships with this package.

Each line is an item. One whose answer is generated, greedily, in the chat template of the model if it has one:

    {"kind": "generation", "task": "sums", "prompt": "7 + 5 =", "answers": ["12"], "match": "number"}
    {"kind": "generation", "messages": [{"role": "user", "content": "..."}], "answers": [{"a": 1}], "match": "json"}

One whose most likely choice is taken, by log likelihood after the prompt as it stands:

    {"kind": "choice", "prompt": "The opposite of hot is", "choices": ["cold", "blue"], "gold": 0}

Lines of MosaicML's LLM Foundry (see `multiple_choice`) are read too. docs/report.md describes all fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn

import pydantic

from edkm_export.errors import InputError
from edkm_export.text import read_text
from edkm_export.verify.multiple_choice import Item, item_of

__all__ = ["BUILTIN", "ChoiceItem", "GenerationItem", "Match", "Task", "Turn", "read_tasks"]

BUILTIN = "builtin"
"""What names the set of this package."""

Match = Literal["exact", "number", "json", "tool-call"]

_MOST_ITEMS = 5000  # of a file; a greedy answer to each takes a second or more
_MOST_CHARACTERS = 20_000  # of a line's texts


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


_Name = pydantic.constr(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.+-]{0,59}$")


class Turn(_Strict):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str = pydantic.Field(min_length=1)


class GenerationItem(_Strict):
    """An item whose answer is generated.

    Attributes:
        kind: "generation".
        task: what it belongs to; None: the name of the file.
        prompt: what the user says.
        messages: instead, turns from the user's first on, the last one the user's: earlier ones are examples.
        answers: what is right, each of them; text, or any JSON value where `match` is "json", or
            {"name": ..., "arguments": {...}} where it is "tool-call".
        match: how an answer is compared, see `task_grading`.
        tools: descriptions of functions, as chat templates take them.
        stop: texts that end the answer.
        max_new_tokens: of the answer.
    """

    kind: Literal["generation"]
    task: _Name | None = None  # type: ignore[valid-type]
    prompt: str | None = pydantic.Field(default=None, min_length=1)
    messages: tuple[Turn, ...] = ()
    answers: tuple[Any, ...] = pydantic.Field(min_length=1)
    match: Match = "exact"
    tools: tuple[dict[str, Any], ...] = ()
    stop: tuple[str, ...] = ()
    max_new_tokens: int = pydantic.Field(default=32, ge=1, le=1024)

    @pydantic.model_validator(mode="after")
    def _sound(self) -> GenerationItem:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give prompt or messages, one of them")
        turns = [turn.role for turn in self.messages]
        if turns and turns != (["user", "assistant"] * len(turns))[: len(turns)]:
            raise ValueError("messages: user and assistant take turns, the user begins")
        if turns and turns[-1] != "user":
            raise ValueError("messages: the last turn is the user's")
        if not all(self.stop):
            raise ValueError("stop: an empty text ends every answer before it begins")
        for answer in self.answers:
            if self.match in ("exact", "number") and not isinstance(answer, str):
                raise ValueError(
                    f"answers: with match {self.match!r} an answer is text, found {answer!r:.80}"
                )
            if self.match == "tool-call" and not _is_call(answer):
                raise ValueError('answers: a tool call is {"name": TEXT, "arguments": {...}}')
        return self

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation up to where the model is to answer."""
        return self.messages or (Turn(role="user", content=str(self.prompt)),)


class ChoiceItem(_Strict):
    """An item whose most likely choice is taken.

    Attributes:
        kind: "choice".
        task: as of `GenerationItem`.
        prompt: what stands before each choice, as it is.
        choices: each follows after a space.
        gold: which of them is right, from 0 on.
    """

    kind: Literal["choice"]
    task: _Name | None = None  # type: ignore[valid-type]
    prompt: str = pydantic.Field(min_length=1)
    choices: tuple[str, ...] = pydantic.Field(min_length=2)
    gold: int = pydantic.Field(ge=0)

    @pydantic.model_validator(mode="after")
    def _sound(self) -> ChoiceItem:
        if not all(self.choices):
            raise ValueError("choices: one is empty")
        if self.gold >= len(self.choices):
            raise ValueError(f"gold: expected 0 to {len(self.choices) - 1}")
        return self


@dataclass(frozen=True)
class Task:
    """Items that are counted together.

    Attributes:
        name: of the task.
        items: generated or chosen.
    """

    name: str
    items: tuple[GenerationItem | Item, ...]


def read_tasks(references: Iterable[str | Path]) -> tuple[Task, ...]:
    """Read files of tasks.

    Args:
        references: JSONL files, or "builtin".

    Returns:
        Items by task, in the order of their first ones. Tasks of several files are apart: where two have the same name,
        the second one's is followed by that of its file.

    Raises:
        InputError: a file cannot be read, or a line is no item; the message names both.
    """
    found: list[Task] = []
    for reference in dict.fromkeys(references):
        own: dict[str, list[GenerationItem | Item]] = {}
        for name, item in _read(reference):
            own.setdefault(name, []).append(item)
        taken = {task.name for task in found}
        for name, items in own.items():
            known = name if name not in taken else f"{name} ({Path(reference).stem})"
            found.append(Task(known, tuple(items)))
    return tuple(found)


def _read(reference: str | Path) -> list[tuple[str, GenerationItem | Item]]:
    if reference == BUILTIN:
        text = (files("edkm_export.verify") / "builtin_tasks.jsonl").read_text(encoding="utf-8")
        where, name = "built-in tasks", BUILTIN
    else:
        text, where, name = read_text(Path(reference)), str(reference), Path(reference).stem
    items = [
        _item(f"{where}: line {number}", line, name)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not items:
        raise InputError(f"{where}: holds no items.")
    if len(items) > _MOST_ITEMS:
        raise InputError(f"{where}: holds {len(items):,} items, at most {_MOST_ITEMS:,} are taken; cut it.")
    return items


def _item(where: str, line: str, name: str) -> tuple[str, GenerationItem | Item]:
    if len(line) > _MOST_CHARACTERS:
        raise InputError(f"{where}: has {len(line):,} characters, at most {_MOST_CHARACTERS:,} are taken.")
    try:
        fields = json.loads(line, parse_constant=_refuse)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no Unicode text.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error!s:.200}).") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where}: is {type(fields).__name__}, expected an object.")
    if "kind" not in fields and "gold" in fields:
        return name, item_of(where, fields)
    kinds: Mapping[Any, type[GenerationItem] | type[ChoiceItem]] = {
        "generation": GenerationItem,
        "choice": ChoiceItem,
    }
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{where}: kind is {kind!r:.80}, expected {' or '.join(kinds)}.")
    try:
        item = kinds[kind].model_validate(fields)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {_explained(error)}") from error
    if isinstance(item, ChoiceItem):
        contexts = (item.prompt,) * len(item.choices)
        return item.task or name, Item(contexts, item.choices, item.gold)
    return item.task or name, item


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _explained(error: pydantic.ValidationError) -> str:
    details: Sequence[Any] = error.errors(include_url=False)
    lines = []
    for detail in details[:3]:
        where = ".".join(map(str, detail["loc"]))
        message = detail["msg"].removeprefix("Value error, ")
        found = f" (found {detail['input']!r:.80})" if where else ""
        lines.append(f"{where + ': ' if where else ''}{message}{found}")
    return "; ".join(lines) + "."


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], dict)
    )
