"""Names of models on a hub: `owner/name`."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

__all__ = ["hub_id_of_url", "is_hub_id"]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"  # begins and ends with neither dot nor dash
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_NOT_MODELS = ("api", "blog", "buckets", "collections", "datasets", "docs", "papers", "spaces")


def is_hub_id(text: str) -> bool:
    """True for `owner/name` as the hub allows it, unless it looks like a file of weights."""
    allowed = _HUB_ID.fullmatch(text) is not None and "--" not in text and ".." not in text
    return allowed and not text.lower().endswith(_FILES)


def hub_id_of_url(url: str) -> str | None:
    """The model that the address of a page of the hub shows; None for other addresses."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or parts.hostname not in _HOSTS:
        return None
    names = [part for part in parts.path.split("/") if part]
    found = "/".join(names[:2])
    return found if len(names) >= 2 and names[0] not in _NOT_MODELS and is_hub_id(found) else None
