"""A model of transformers with a key-value cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

__all__ = ["new_cache", "run_cached"]


def new_cache(model: Any) -> Any:
    """Make an empty cache: layers with a sliding window will forget what has left it.

    Args:
        model: transformers.PreTrainedModel.

    Returns:
        transformers.DynamicCache.
    """
    import transformers

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
