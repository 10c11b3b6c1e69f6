"""From what a user types to tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import EdkmExportError, InputError
from edkm_export.guarded_tokenizer import open_tokenizer

__all__ = ["encode_prompt", "encode_turns", "read_settings", "read_tokenizer"]


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of an exported folder. Remote code is never run.

    Raises:
        InputError: there is none, or one that transformers cannot read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(
            f"{folder}: holds no tokenizer; give the folder that `edkm-export` made, not a file of it."
        )
    try:
        return open_tokenizer(folder, str(folder))
    except EdkmExportError:
        raise
    except Exception as error:  # what a damaged tokenizer raises has no common base
        raise InputError(f"{folder}: its tokenizer cannot be read: {_first_line(error)}") from error


def read_settings(content: bytes, where: str) -> dict[str, Any]:
    """Contents of a generation_config.json or config.json.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is no JSON ({_first_line(error)}).") from error
    if not isinstance(settings, dict):
        raise InputError(f"{where}: is no JSON object.")
    return settings


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool, where: str) -> Tensor:
    """Tokens of a prompt.

    Args:
        tokenizer: of transformers.
        prompt: the text.
        chat: put it into the tokenizer's chat template, as what a user says.
        where: the model, for messages.

    Returns:
        int64 [tokens].

    Raises:
        InputError: the prompt is no Unicode text or gives no tokens, or there is no usable chat template.
    """
    if chat:
        return encode_turns(tokenizer, [{"role": "user", "content": prompt}], where)
    return _encode(tokenizer, prompt, where, special=True)


def encode_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]], where: str) -> Tensor:
    """Tokens of a conversation, up to where the model is to answer.

    Args:
        tokenizer: of transformers.
        turns: {"role": "user" or "assistant", "content": text} each, the last one of the user.
        where: the model, for messages.

    Returns:
        int64 [tokens].

    Raises:
        InputError: as for `encode_prompt`.
    """
    for turn in turns:
        _require_text(turn["content"])
    if not tokenizer.chat_template:
        raise InputError(f"{where}: its tokenizer has no chat template; leave --chat out.")
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except EdkmExportError:
        raise
    except Exception as error:  # a template is a program, with errors of its own
        raise InputError(f"{where}: its chat template fails: {_first_line(error)}") from error
    return _encode(tokenizer, text, where, special=False)  # the template writes the special tokens itself


def _encode(tokenizer: Any, text: str, where: str, *, special: bool) -> Tensor:
    _require_text(text)
    try:
        tokens = tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    except EdkmExportError:
        raise
    except Exception as error:  # a tokenizer is a program too
        raise InputError(f"{where}: its tokenizer cannot encode the prompt: {_first_line(error)}") from error
    if not tokens:
        raise InputError("--prompt: gives no tokens; write at least one word.")
    return torch.tensor(tokens, dtype=torch.int64)


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("--prompt: is not valid text in the encoding of this terminal.") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
