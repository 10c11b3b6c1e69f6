from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.text import check_text, read_text, token_windows


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


# What can be told from the first bytes


def test_a_text_is_checked_without_torch(tmp_path):
    (tmp_path / "text").write_text("word")
    program = (
        "import sys; from pathlib import Path\n"
        "from edkm_export.errors import InputError; from edkm_export.text import check_text\n"
        "try: check_text(Path(sys.argv[1]), least_characters=32)\n"
        "except InputError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "text")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    first, imported = done.stdout.splitlines()
    assert "text: holds 4 characters, and at least 32 tokens are needed" in first and imported == "False"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n" * 99, "is empty"),
        (b"caf\xe9", "is not UTF-8 text (byte 3)"),
        (b"a" * 70_000 + b"\xff" * 9, None),  # beyond the first bytes; read_text finds it
        (b"a" * 65_535 + "é".encode() + b"a" * 99, None),  # cut in the middle of a character
        (b"a\0b" * 70_000, "is not text (character 1 is zero)"),
        (b"PK\3\4\0\0", "is not text (character 4 is zero)"),
        (b"word", "holds 4 characters"),
        (b"words that are ordinary, and enough", None),
    ],
)
def test_what_the_first_bytes_tell(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    if message is None:
        check_text(tmp_path / "text", least_characters=32)
        return
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'text'}: {message}")):
        check_text(tmp_path / "text", least_characters=32)


def test_a_pipe_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_text(tmp_path / "pipe", least_characters=32)  # reading it would wait for a writer


def test_a_text_with_fewer_tokens_than_are_needed():
    with pytest.raises(
        InputError, match="book.txt: gives 31 tokens, at least 32 are needed; use a longer text"
    ):
        token_windows("x" * 31, Letters(), tokens=64, context=16, source="book.txt", least=32)
    assert token_windows("x" * 32, Letters(), tokens=64, context=16, source="", least=32).shape == (2, 16)
    assert token_windows("x" * 8, Letters(), tokens=8, context=16, source="", least=32).shape == (
        1,
        8,
    )  # as asked
