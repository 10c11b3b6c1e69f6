"""Text files as windows of tokens, for calibration and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import InputError
from edkm_export.token_ids import Ids, as_ids

__all__ = ["read_text", "token_windows"]

# A token of the usual vocabularies is 3 to 5 characters of English; only as much text is tokenized as can be
# needed, because some tokenizers are slow on whole books.
_CHARACTERS_PER_TOKEN = 16


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: missing, unreadable, not UTF-8, or empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such text file.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text (byte {error.start}); convert it with iconv first."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise InputError(f"{path}: is empty.")
    return text


def token_windows(text: str | Ids, tokenizer: Any, *, tokens: int, context: int, source: str) -> Tensor:
    """The first tokens of a text, cut into windows that are evaluated independently.

    Args:
        text: the text, or its ids in any form that `as_ids` takes.
        tokenizer: a transformers tokenizer; not used for ids.
        tokens: how many are wanted; all of the text when it has fewer.
        context: tokens of one window.
        source: where the text is from, for messages.

    Returns:
        int64 [windows, context], the last incomplete window dropped; one shorter window when the text has
        fewer tokens than `context`.

    Raises:
        InputError: fewer than two tokens.
    """
    if isinstance(text, str):
        start = text[: tokens * _CHARACTERS_PER_TOKEN]
        found = tokenizer(start, return_attention_mask=False, verbose=False)["input_ids"]
        ids = torch.tensor(found[:tokens], dtype=torch.int64)
    else:
        ids = as_ids(text, source)[:tokens]
    if len(ids) < 2:
        raise InputError(f"{source}: gives {len(ids)} token(s), at least 2 are needed; use a longer text.")
    if len(ids) < context:
        return ids[None]
    return ids[: len(ids) // context * context].view(-1, context)
