"""Text files and JSONL as training tokens.

JSONL lines are objects of one of these forms:

    {"text": "..."}
    {"instruction": "...", "input": "...", "output": "..."}            Alpaca; "input" may be left out
    {"instruction": "...", "instances": [{"input", "output"}, ...]}    Alpaca's seed tasks
    {"messages": [{"role": "user", "content": "..."}, ...]}            chat, by the model's own template
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edkm_export.errors import InputError
from edkm_export.text import read_text
from edkm_export.training.tokens import SUFFIX, Tokens

__all__ = ["Document", "read_documents", "read_tokens", "tokenize"]

_ALPACA = (
    "Below is an instruction that describes a task{more}. "
    "Write a response that appropriately completes the request.\n\n"
)
_ROLES = ("system", "user", "assistant", "tool")
_TEXT_CHARACTERS = 1 << 20  # a long text is tokenized in pieces that end at a line


@dataclass(frozen=True)
class Document:
    """Something to learn from: either `text`, or `messages`.

    Attributes:
        text: plain text, tokenized as it is.
        prompt: text before it that does not count when only answers are learned.
        messages: a conversation.
        where: file and line, for messages.
    """

    where: str
    text: str = ""
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()


def read_tokens(
    paths: Sequence[str | Path], tokenizer: Any, *, answers_only: bool = False, chat: bool = False
) -> Tokens:
    """All data: first what has to be tokenized, see `tokenize`, then `.tokens` files as they are.

    Raises:
        InputError: a file or line that cannot be used, or no data at all.
    """
    files = [Path(path) for path in paths]
    parts = [Tokens.load(path) for path in files if path.suffix == SUFFIX]
    texts = [path for path in files if path.suffix != SUFFIX]
    if texts or not parts:
        parts.insert(0, tokenize(read_documents(texts), tokenizer, answers_only=answers_only, chat=chat))
    return Tokens.join(parts)


def read_documents(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Documents of all files; `.jsonl` and `.json` files hold one a line, other files are one plain text.

    Raises:
        InputError: a file or line that cannot be used; the message names both.
    """
    for path in map(Path, paths):
        if path.suffix.lower() not in (".jsonl", ".json"):
            yield Document(where=str(path), text=read_text(path))
            continue
        found = False
        for number, line in enumerate(_text_lines(read_text(path)), 1):
            if line.strip():
                found = True
                yield from _parse(f"{path}:{number}", line)
        if not found:
            raise InputError(f"{path}: holds no documents.")


def _text_lines(text: str) -> Iterator[str]:
    """One after the other: a list of them would take fifty times the text, if it were line feeds alone."""
    start = 0
    while start <= len(text):
        stop = text.find("\n", start)
        stop = len(text) if stop < 0 else stop
        yield text[start:stop]
        start = stop + 1


def _parse(where: str, line: str) -> Iterator[Document]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python reads
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at column {error.colno}"
        raise InputError(f"{where}: is not JSON ({reason}); each line must be one object.") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: is a JSON {type(record).__name__}, expected an object.")
    if "messages" in record:
        yield Document(where=where, messages=_messages(where, record["messages"]))
    elif "instruction" in record:
        instruction = _string(where, record, "instruction")
        instances = record.get("instances", [record])
        if not isinstance(instances, list) or not instances:
            raise InputError(f"{where}: 'instances' must be a list that is not empty.")
        for instance in instances:
            if not isinstance(instance, dict):
                raise InputError(
                    f"{where}: an instance is a JSON {type(instance).__name__}, expected an object."
                )
            extra = _string(where, instance, "input") if instance.get("input") else ""
            yield Document(
                where=where, prompt=_alpaca(instruction, extra), text=_string(where, instance, "output")
            )
    elif "text" in record:
        yield Document(where=where, text=_string(where, record, "text"))
    else:
        keys = ", ".join(sorted(map(str, record))[:6]) or "none"
        raise InputError(
            f"{where}: has the fields {keys}; expected 'text', 'instruction' and 'output', or 'messages'."
        )


def _string(where: str, record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: '{key}' is {json.dumps(value)[:40]}, expected a text.")
    if not value.strip():
        raise InputError(f"{where}: '{key}' is empty.")
    _require_unicode(where, key, value)
    return value


def _require_unicode(where: str, key: str, text: str) -> None:
    """Refuse a half of a pair of surrogates, which JSON can write and no tokenizer reads."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}: '{key}' is no Unicode text: it holds half of a surrogate pair.")


def _messages(where: str, value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: 'messages' must be a list that is not empty.")
    for message in value:
        role = message.get("role") if isinstance(message, dict) else message
        if not isinstance(message, dict) or not isinstance(role, str) or role not in _ROLES:
            raise InputError(
                f"{where}: a message's role is {json.dumps(role)[:40]}, expected one of {', '.join(_ROLES)}."
            )
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where}: the content of a message of the {message['role']} is not a text.")
        _require_unicode(where, "content", message["content"])
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _alpaca(instruction: str, extra: str) -> str:
    more = ", paired with an input that provides further context" if extra else ""
    part = f"### Input:\n{extra}\n\n" if extra else ""
    return f"{_ALPACA.format(more=more)}### Instruction:\n{instruction}\n\n{part}### Response:\n"


def tokenize(
    documents: Iterable[Document], tokenizer: Any, *, answers_only: bool = False, chat: bool = False
) -> Tokens:
    """Tokenize documents, each followed by the end-of-text token.

    Args:
        documents: what `read_documents` gives.
        tokenizer: a transformers tokenizer.
        answers_only: only the output of an instruction, or what the assistant says, is part of the loss.
        chat: write instructions as a conversation in the model's template instead of in Alpaca's words.

    Raises:
        InputError: no documents; or a conversation for a model that has no chat template, or one it refuses.
    """
    parts = []
    for document in documents:
        for ids, counts in _pieces(document, tokenizer, chat):
            mask = torch.tensor(counts, dtype=torch.bool) if answers_only else None
            parts.append(Tokens(torch.tensor(ids, dtype=torch.int32), mask))
    if not parts:
        raise InputError("there is no training data; give at least one file.")
    return Tokens.join(parts)


def _pieces(document: Document, tokenizer: Any, chat: bool) -> Iterator[tuple[list[int], list[bool]]]:
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if document.messages or (chat and document.prompt):
        yield _conversation(document, tokenizer)
    elif document.prompt:
        prompt = _encode(tokenizer, document.prompt)
        answer = _encode(tokenizer, document.text) + end
        yield prompt + answer, [False] * len(prompt) + [True] * len(answer)
    else:
        for start, stop in _lines(document.text):
            ids = _encode(tokenizer, document.text[start:stop]) + (end if stop == len(document.text) else [])
            yield ids, [True] * len(ids)


def _lines(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > _TEXT_CHARACTERS:
            stop = text.rfind("\n", start, start + _TEXT_CHARACTERS) + 1 or start + _TEXT_CHARACTERS
        yield start, stop
        start = stop


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _conversation(document: Document, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them the assistant says."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{document.where}: is a conversation, but the model has no chat template; use plain text."
        )
    messages = document.messages or (
        {"role": "user", "content": document.prompt},
        {"role": "assistant", "content": document.text},
    )
    try:
        pieces = _turns(messages, tokenizer)
    except Exception as error:  # a template may raise anything; it comes with the model
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{document.where}: the model's chat template refuses it ({reason}).") from error
    ids: list[int] = []
    counts: list[bool] = []
    for text, spoken in pieces:
        part = _encode(tokenizer, text) if text else []
        ids += part
        counts += [spoken] * len(part)
    return ids, counts


def _turns(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces, and whether the assistant says them."""

    def render(count: int, *, answering: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages[:count]), tokenize=False, add_generation_prompt=answering
        )
        return text

    pieces: list[tuple[str, bool]] = []
    done = ""
    for turn, message in enumerate(messages):
        text = render(turn + 1)
        if not text.startswith(done):  # a template that rewrites earlier turns cannot be cut
            return [(render(len(messages)), True)]
        if message["role"] == "assistant" and turn:
            opened = render(turn, answering=True)
            if opened.startswith(done) and text.startswith(opened):
                pieces.append((opened[len(done) :], False))
                done = opened
        pieces.append((text[len(done) :], message["role"] == "assistant"))
        done = text
    return pieces
