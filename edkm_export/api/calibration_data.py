"""What a caller calibrates with: a text file, strings, a dataset, token ids, or inputs of a module."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.calibration import Batch
from edkm_export.errors import InputError
from edkm_export.text import read_text, token_windows
from edkm_export.token_ids import as_ids

__all__ = ["CONTEXT", "CalibrationInput", "as_batches", "read_calibration", "takes_ids"]

CONTEXT = 512
"""Tokens of one window."""

_CHARACTERS_PER_TOKEN = 16  # as `token_windows` reads: more text than this is never needed
_JOINT = "\n\n"


@dataclass(frozen=True)
class CalibrationInput:
    """A text, or its token ids.

    Attributes:
        name: what to call it.
        text: None where there are ids.
        ids: int64 [tokens], or None.
    """

    name: str
    text: str | None = None
    ids: Tensor | None = None

    def content(self, tokenizer: Any) -> str | Tensor:
        """Text or ids.

        Raises:
            InputError: a text without a tokenizer.
        """
        if self.text is None:
            assert self.ids is not None
            return self.ids
        if tokenizer is None:
            raise InputError(
                f"{self.name}: is text, which takes a tokenizer; give tokenizer=, or calibrate with token ids."
            )
        return self.text

    def windows(self, tokenizer: Any, tokens: int) -> Tensor:
        """The first tokens, int64 [windows, at most 512].

        Raises:
            InputError: fewer than two, or a text without a tokenizer.
        """
        found = self.content(tokenizer)
        return token_windows(found, tokenizer, tokens=tokens, context=CONTEXT, source=self.name)

    def provenance(self, windows: Tensor) -> dict[str, Any]:
        """Its name, the sha256 of text or ids, and how many tokens were used."""
        content = self.text.encode() if self.text is not None else windows.numpy().tobytes()
        return {
            "text": self.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "tokens": windows.numel(),
        }


def read_calibration(given: Any, tokens: int, what: str = "calibration") -> CalibrationInput:
    """Text or token ids in any form.

    Args:
        given: path of a UTF-8 file; strings; rows of a dataset with a "text" or "input_ids" column; or token ids, as
            `as_ids` takes them, of one text or of several.
        tokens: how many are wanted; no more of a dataset is read than that takes.
        what: the argument, for messages.

    Raises:
        InputError: it is none of these, empty, or a file that is not there.
    """
    if isinstance(given, CalibrationInput):
        return given
    if isinstance(given, (str, Path)):
        return _read_file(given, what)
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            splits = ", ".join(map(str, given)) or "nothing"
            raise InputError(
                f"{what}: is a mapping of {splits}; give one of its parts, such as dataset['train'], or texts."
            )
        given = given["input_ids"]
    if isinstance(given, Tensor) or hasattr(given, "__array__"):
        rows = given if getattr(given, "ndim", 1) == 2 else [given]
        return CalibrationInput("token ids", ids=_joined(rows, tokens, what))
    if not isinstance(given, Iterable):
        raise InputError(
            f"{what}: is {type(given).__name__}, expected a path, strings, a dataset or token ids."
        )
    return _read_rows(iter(given), tokens, what)


def _read_file(path: str | Path, what: str) -> CalibrationInput:
    try:
        return CalibrationInput(str(path), text=read_text(path))
    except (InputError, OSError, ValueError) as error:  # a long text is no name that a system looks for
        if isinstance(path, str) and (isinstance(error, OSError) or not Path(path[:200]).exists()):
            raise InputError(
                f"{what}: no such text file: {path!r:.80}; text itself goes in a list: {what}=[text]."
            ) from error
        raise


def _read_rows(rows: Iterator[Any], tokens: int, what: str) -> CalibrationInput:
    first = next(rows, None)
    if first is None:
        raise InputError(f"{what}: is empty; give at least one text.")
    rows = itertools.chain([first], rows)
    if _is_number(first):
        return CalibrationInput("token ids", ids=_checked(as_ids(list(rows), what)[:tokens], what))
    if isinstance(first, str) or (isinstance(first, Mapping) and "text" in first):
        texts: list[str] = []
        length = 0
        for place, row in enumerate(rows):
            texts.append(_text_of(row, place, what))
            length += len(texts[-1])
            if length > tokens * _CHARACTERS_PER_TOKEN:
                break
        text = _JOINT.join(text for text in texts if text.strip())
        if not text:
            raise InputError(f"{what}: its texts are empty.")
        return CalibrationInput(f"{len(texts)} text{'s' if len(texts) > 1 else ''}", text=text)
    if isinstance(first, Mapping) and "input_ids" not in first:
        columns = ", ".join(map(str, first))
        raise InputError(
            f"{what}: its rows have the columns {columns}, expected 'text' or 'input_ids'; rename one, or give "
            f"strings: {what}=[row[...] for row in dataset]."
        )
    return CalibrationInput("token ids", ids=_joined(rows, tokens, what))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


def _text_of(row: Any, place: int, what: str) -> str:
    text = row.get("text") if isinstance(row, Mapping) else row
    if not isinstance(text, str):
        raise InputError(f"{what}: row {place} is {type(text).__name__}, expected a string as in row 0.")
    return text


def _joined(rows: Iterable[Any], tokens: int, what: str) -> Tensor:
    """Ids of several texts, one after the other, as many as are wanted."""
    parts: list[Tensor] = []
    length = 0
    for place, row in enumerate(rows):
        parts.append(as_ids(row, f"{what}, row {place}"))
        length += len(parts[-1])
        if length >= tokens:
            break
    if not parts:
        raise InputError(f"{what}: is empty; give at least one text.")
    return _checked(torch.cat(parts)[:tokens], what)


def _checked(ids: Tensor, what: str) -> Tensor:
    if int(ids.min()) < 0:
        raise InputError(f"{what}: id {int(ids.min())} is negative; mask padding out first.")
    return ids


def as_batches(given: Any, module: nn.Module) -> Iterator[Batch]:
    """Arguments of calls of a module.

    Args:
        given: a tensor or array, the one argument of one call; a tuple of positional arguments; a mapping of named
            ones; or an iterable of these, such as a list or a DataLoader.
        module: its first parameter says on which device they are to be.

    Raises:
        InputError: it is none of these, or there are none.
    """
    if isinstance(given, (str, bytes, Path)):
        raise InputError(
            f"calibration: is text, and a {type(module).__name__} is no language model; give example inputs: a tensor, "
            "a tuple, a dict, or several of them."
        )
    single = isinstance(given, (Tensor, tuple, Mapping)) or hasattr(given, "__array__")
    if not single and not isinstance(given, Iterable):
        raise InputError(
            f"calibration: is {type(given).__name__}, expected example inputs: a tensor, a tuple, a dict, or several "
            "of them."
        )
    place = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    empty = True
    for batch in [given] if single else given:
        empty = False
        if isinstance(batch, Mapping):
            yield (), {str(name): _moved(value, place) for name, value in batch.items()}
        elif isinstance(batch, (tuple, list)):
            yield tuple(_moved(value, place) for value in batch), {}
        else:
            yield (_moved(batch, place),), {}
    if empty:
        raise InputError("calibration: is empty; give at least one example input.")


def _moved(value: Any, device: torch.device) -> Any:
    """Arrays as tensors on the device of the module; other arguments as they are."""
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        value = torch.from_numpy(value)
    return value.to(device) if isinstance(value, Tensor) else value


def takes_ids(module: nn.Module) -> bool:
    """Whether a module is called with token ids, as the encoders of transformers are."""
    return "input_ids" in inspect.signature(module.forward).parameters
