"""Models of the Hugging Face hub: fetched into its cache, pickles and code excepted."""

from __future__ import annotations

from pathlib import Path

__all__ = ["fetch"]

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_LEFT_OUT = ["*/*", "consolidated*", "adapter_model*"]


def fetch(name: str, files: list[str] | None = None) -> Path:
    """Folder with the files of a hub model.

    Args:
        name: its id.
        files: patterns of those that are wanted; None: what a model needs.
    """
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(name, allow_patterns=files or _FILES, ignore_patterns=_LEFT_OUT)
    )
