from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.text import read_text, token_windows


class Letters:
    """A tokenizer of one token a character, which counts what it is given."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        self.characters = len(text)
        return {"input_ids": [ord(character) for character in text]}


def test_read_text_keeps_the_text(tmp_path):
    (tmp_path / "text").write_bytes("naïve “text” 🙂\n\n".encode())
    assert read_text(tmp_path / "text") == "naïve “text” 🙂\n\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such text file"),
        (b"", "is empty"),
        (b" \n\t \n", "is empty"),
        (b"caf\xe9", "is not UTF-8 text (byte 3); convert it with iconv first"),
        (b"\xff\xfea\x00", "is not UTF-8 text (byte 0)"),
    ],
)
def test_unusable_text_is_named(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        read_text(path)


def test_folder_is_not_a_text(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("length", "tokens", "context", "shape"),
    [
        (100, 64, 16, (4, 16)),
        (100, 70, 16, (4, 16)),  # the last incomplete window is dropped
        (100, 1000, 16, (6, 16)),  # fewer than were asked for
        (100, 16, 16, (1, 16)),
        (100, 15, 16, (1, 15)),  # one shorter window
        (10, 64, 16, (1, 10)),
        (2, 64, 16, (1, 2)),
    ],
)
def test_windows(length, tokens, context, shape):
    text = "".join(chr(33 + index % 90) for index in range(length))
    windows = token_windows(text, Letters(), tokens=tokens, context=context, source="text")
    assert windows.dtype == torch.int64 and tuple(windows.shape) == shape
    assert windows.flatten().tolist() == [ord(character) for character in text[: windows.numel()]]


@pytest.mark.parametrize("text", ["", "a"])
def test_too_few_tokens(text):
    with pytest.raises(InputError, match=f"book.txt: gives {len(text)} token.*use a longer text"):
        token_windows(text, Letters(), tokens=64, context=16, source="book.txt")


def test_only_the_needed_part_of_a_book_is_tokenized():
    tokenizer = Letters()
    token_windows("x" * 1_000_000, tokenizer, tokens=64, context=16, source="book.txt")
    assert 64 <= tokenizer.characters <= 64 * 32  # far below the book, far above what 64 tokens can need
