"""The files that an app needs beside the weights, portable to every runtime that reads them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from edkm_export.end_tokens import as_setting, end_tokens

__all__ = ["embedding_tokenizer_files", "tokenizer_files"]


def tokenizer_files(tokenizer: Any, model: Any) -> dict[str, bytes]:
    """What an app needs beside the weights: tokenizer, chat template and generation settings, {name: bytes}.

    The end tokens in generation_config.json are all that the tokenizer, the model's configuration and its generation
    settings name; the model's configuration is given the same ones.
    """
    generation = getattr(model, "generation_config", None)
    known = {} if generation is None else generation.to_dict()
    ends = end_tokens(known, model.config.to_dict(), {"eos_token_id": tokenizer.eos_token_id})
    model.config.eos_token_id = as_setting(ends)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if generation is not None:
            generation.save_pretrained(folder)
        files = {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.name != "config.json"
        }
    name = "generation_config.json"
    settings = json.loads(files[name]) if name in files else {}
    if ends:
        settings["eos_token_id"] = as_setting(ends)
    if settings:
        files[name] = _as_json(settings)
    _make_portable(files, tokenizer.chat_template)
    return files


def embedding_tokenizer_files(tokenizer: Any, max_tokens: int) -> dict[str, bytes]:
    """The tokenizer of an embedding model, {name: bytes}: it cuts texts to `max_tokens`, special tokens included."""
    before = tokenizer.model_max_length
    tokenizer.model_max_length = max_tokens
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = {
                path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()
            }
    finally:
        tokenizer.model_max_length = before
    name = "tokenizer_config.json"
    # transformers leaves this out where it was set later, and transformers.js takes the last column for the last token
    files[name] = _as_json({**json.loads(files[name]), "padding_side": tokenizer.padding_side})
    _make_portable(files, tokenizer.chat_template)
    return files


def _as_json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _make_portable(files: dict[str, bytes], template: str | dict[str, str] | None) -> None:
    """Keep the maker's folders out of what is shipped, and say what every runtime knows.

    transformers writes a chat template into a file of its own; older readers and apps look for it in
    tokenizer_config.json, where several have their names.
    """
    name = "tokenizer_config.json"
    if name in files:
        settings = json.loads(files[name])
        for key in (
            "name_or_path",
            "tokenizer_file",
            "vocab_file",
            "local_files_only",
            "is_local",
            "backend",
        ):
            settings.pop(key, None)
        if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5 only
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(template, str):
            settings["chat_template"] = template
        elif template:
            settings["chat_template"] = [{"name": key, "template": text} for key, text in template.items()]
            files.pop("chat_template.jinja", None)  # the others would be lost beside it
        files[name] = _as_json(settings)
