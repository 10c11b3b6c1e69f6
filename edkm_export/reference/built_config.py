"""Configurations of transformers from plain settings."""

from __future__ import annotations

from typing import Any

__all__ = ["built_config"]


def built_config(settings: dict[str, Any]) -> Any:
    """A configuration whose model computes what it says, with every version of transformers that we take.

    With SDPA some of them leave out the soft cap of attention scores (Gemma 2) when they load a model, without a word.

    Args:
        settings: as in config.json, `model_type` among them.

    Returns:
        transformers.PretrainedConfig.

    Raises:
        Exception: of several classes, when the settings do not fit together; configurations check themselves.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**settings)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"
    return config
