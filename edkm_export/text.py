"""Text files as windows of tokens, for calibration and evaluation."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edkm_export.errors import InputError
from edkm_export.regular_file import open_regular

if TYPE_CHECKING:  # importing it takes seconds, which a text that is missing must not wait for
    from torch import Tensor

    from edkm_export.token_ids import Ids

__all__ = ["LEAST_TOKENS", "check_text", "in_windows", "read_text", "token_ids", "token_windows"]

LEAST_TOKENS = 32
"""A text of fewer says nothing about a model: a mean over them is one sentence's accident."""

# A token of the usual vocabularies is 3 to 5 characters of English; only as much text is tokenized as can be
# needed, because some tokenizers are slow on whole books.
_CHARACTERS_PER_TOKEN = 16
_HEAD_BYTES = 1 << 16
_PIECE_BYTES = 1 << 24


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: missing, unreadable, not UTF-8, or empty.
    """
    path = Path(path)
    try:
        text = _read(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such text file.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder and cannot be read as a text; name a file in it.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text (byte {error.start}); convert it with iconv first."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise InputError(f"{path}: is empty; give a text of a few thousand words.")
    return text


def _read(path: Path) -> str:
    """Text of an ordinary file or a pipe, as far as it is text: no gigabytes of zeros are read.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
        InputError: a character is zero.
    """
    if path.is_fifo():  # as shells make them for `<(command)`; one that nobody writes into is empty
        file: IO[bytes] = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
        os.set_blocking(file.fileno(), True)
    else:
        file = open_regular(path)
    data = bytearray()
    with file:
        while piece := file.read(_PIECE_BYTES):
            if (place := piece.find(0)) >= 0:
                before = len((data + piece[:place]).decode("utf-8"))
                raise InputError(
                    f"{path}: is not text (character {before} is zero); give a plain UTF-8 text."
                )
            data += piece
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def check_text(path: Path | None, *, least_characters: int = LEAST_TOKENS) -> None:
    """Refuse a file that cannot be a text, from its first bytes, before anything is loaded.

    Pipes are left for `read_text`: what is read from them is gone.

    Args:
        path: of the file; None: there is nothing to check.
        least_characters: that it has to have; a token takes one or more.

    Raises:
        InputError: missing, a folder, unreadable, empty, not UTF-8, or too short.
    """
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
        whole = path.stat().st_size <= len(head)
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
    except (OSError, UnicodeDecodeError):
        read_text(path)  # says what is wrong
        raise
    if whole or "\0" in text:
        read_text(path)
    if whole and len(text.strip()) < least_characters:
        raise InputError(
            f"{path}: holds {len(text.strip())} characters, and at least {least_characters} tokens are needed, of some "
            "4 characters each; use a longer text, best of a few thousand words."
        )


def token_ids(text: str, tokenizer: Any, tokens: int | None = None) -> list[int]:
    """The first tokens of a text, or all of them; special ones that the tokenizer adds are included."""
    part = text if tokens is None else text[: tokens * _CHARACTERS_PER_TOKEN]
    ids: list[int] = tokenizer(part, return_attention_mask=False, verbose=False)["input_ids"]
    return ids if tokens is None else ids[:tokens]


def token_windows(
    text: str | Ids, tokenizer: Any, *, tokens: int, context: int, source: str, least: int = 2
) -> Tensor:
    """The first tokens of a text, cut into windows that are evaluated independently.

    Args:
        text: the text, or its ids in any form that `as_ids` takes.
        tokenizer: a transformers tokenizer; not used for ids.
        tokens: how many are wanted; all of the text when it has fewer.
        context: tokens of one window.
        source: where the text is from, for messages.
        least: tokens that there must be, unless fewer are wanted.

    Returns:
        int64 [windows, context], the last incomplete window dropped; one shorter window when the text has
        fewer tokens than `context`.

    Raises:
        InputError: there are fewer tokens than that, or than two.
    """
    import torch

    if isinstance(text, str):
        ids = torch.tensor(token_ids(text, tokenizer, tokens), dtype=torch.int64)
    else:
        from edkm_export.token_ids import as_ids

        ids = as_ids(text, source)[:tokens]
    least = max(2, min(tokens, least))
    if len(ids) < least:
        raise InputError(
            f"{source}: gives {len(ids)} token{'s'[: len(ids) != 1]}, at least {least} are needed; use a longer text, "
            f"best of {tokens:,} tokens (some {tokens * 3 // 4:,} words) or more."
        )
    return in_windows(ids, context)


def in_windows(ids: Tensor, context: int) -> Tensor:
    """Cut tokens [n] into windows [windows, context], the last incomplete one dropped; fewer tokens are one window."""
    if len(ids) < context:
        return ids[None]
    return ids[: len(ids) // context * context].view(-1, context)
