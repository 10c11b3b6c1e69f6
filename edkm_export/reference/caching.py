"""A model of transformers with a key-value cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from edkm_export.kv_cache import FLOAT, INT8, KVCache
from edkm_export.reference.int8_cache import int8_cache

__all__ = ["new_cache", "run_cached"]


def new_cache(model: Any, kv_cache: KVCache = FLOAT) -> Any:
    """Make an empty cache: layers with a sliding window will forget what has left it.

    Args:
        model: transformers.PreTrainedModel.
        kv_cache: how keys and values are held.

    Returns:
        transformers.DynamicCache.
    """
    import transformers

    if kv_cache == INT8:
        return int8_cache(model)
    return transformers.DynamicCache(config=model.config)


def run_cached(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Go on with texts; the cache grows.

    transformers calls it `past_key_values` up to 5.23, and `cache` later.

    Args:
        model: transformers.PreTrainedModel.
        tokens: int64 [batch, new].
        cache: see `new_cache`.

    Returns:
        Logits [batch, new, vocab_size].
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits: Tensor = model(input_ids=tokens, use_cache=True, **{name: cache}).logits
    return logits
