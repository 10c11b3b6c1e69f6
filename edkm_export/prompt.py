"""From what a user types to tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import InputError

__all__ = ["encode_prompt", "read_settings", "read_tokenizer"]


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of an exported folder. Remote code is never run.

    Raises:
        InputError: there is none, or one that transformers cannot read.
    """
    folder = Path(folder)
    import transformers

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(
            f"{folder}: holds no tokenizer; give the folder that `edkm-export` made, not a file of it."
        )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
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
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError("--prompt: is not valid text in the encoding of this terminal.") from error
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"{where}: its tokenizer has no chat template; leave --chat out.")
        turns = [{"role": "user", "content": prompt}]
        try:
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, with errors of its own
            raise InputError(f"{where}: its chat template fails: {_first_line(error)}") from error
    # The template writes the special tokens itself.
    try:
        tokens = tokenizer(prompt, add_special_tokens=not chat, return_attention_mask=False)["input_ids"]
    except Exception as error:  # a tokenizer is a program too
        raise InputError(f"{where}: its tokenizer cannot encode the prompt: {_first_line(error)}") from error
    if not tokens:
        raise InputError("--prompt: gives no tokens; write at least one word.")
    return torch.tensor(tokens, dtype=torch.int64)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
