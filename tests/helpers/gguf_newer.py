"""What llama.cpp's converter writes for the newer families, beside what all have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["in_turn", "newer_settings"]


def newer_settings(config: Any, arch: str, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    """Keys of one architecture, without its name."""
    write = {
        "cohere2": _cohere2,
        "exaone4": _exaone4,
        "granite": _granite,
        "hunyuan-dense": _hunyuan,
        "lfm2": _lfm2,
        "mistral3": _mistral3,
        "olmo2": _olmo2,
        "qwen35": _qwen35,
        "stablelm": _stablelm,
    }.get(arch)
    return {} if write is None else write(config, head_dim, rope)


def _pattern(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }


def _cohere2(config: Any, head_dim: int, _rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "logit_scale": config.logit_scale,
        "attention.sliding_window": config.sliding_window,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": head_dim,
        "rope.scaling.type": "none",
    }


def _exaone4(config: Any, _head_dim: int, _rope: dict[str, Any]) -> dict[str, Any]:
    found = {"vocab_size": config.vocab_size}
    return found | (_pattern(config) if config.sliding_window else {})


def _granite(config: Any, _head_dim: int, _rope: dict[str, Any]) -> dict[str, Any]:
    hybrid = {
        "attention.head_count_kv": [config.num_key_value_heads] * config.num_hidden_layers,
        "expert_shared_feed_forward_length": 48,
        "rope.scaling.finetuned": True,
        "ssm.conv_kernel": 4,
        "ssm.group_count": 1,
        "ssm.inner_size": 64,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 2,
    }
    return (hybrid if config.model_type == "granitemoehybrid" else {}) | {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _hunyuan(_config: Any, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] != "dynamic":
        return {}
    return {
        "rope.freq_base": rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2)),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": 256 * 1024,
        "context_length": 256 * 1024,
    }


def _lfm2(config: Any, _head_dim: int, _rope: dict[str, Any]) -> dict[str, Any]:
    heads = config.num_key_value_heads
    return {
        "attention.head_count_kv": [0 if kind == "conv" else heads for kind in config.layer_types],
        "vocab_size": config.vocab_size,
        "shortconv.l_cache": config.conv_L_cache,
    }


def _mistral3(config: Any, _head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    if config.model_type != "ministral3":
        return {}
    return {
        "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


def _olmo2(config: Any, _head_dim: int, _rope: dict[str, Any]) -> dict[str, Any]:
    return _pattern(config) if config.model_type == "olmo3" else {}


def _qwen35(config: Any, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "full_attention_interval": 4,
        "rope.dimension_count": int(head_dim * rope["partial_rotary_factor"]),
        "rope.dimension_sections": [*rope["mrope_section"], 0],
    }


def _stablelm(config: Any, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "use_parallel_residual": True,  # what it writes for models whose configuration has no such key
        "rope.dimension_count": int(head_dim * rope["partial_rotary_factor"]),
    }


def in_turn(value: NDArray[np.float32], config: Any, module: str, suffix: str) -> NDArray[np.float32]:
    """A parameter of linear attention with its heads of values in the converter's order.

    Heads that share a head of keys lie beside each other in the model; stored are the first ones of all heads of
    keys, then the second ones, and so on.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    order = np.arange(values).reshape(keys, values // keys).T.ravel()
    size = config.linear_value_head_dim
    wide = (order[:, None] * size + np.arange(size)).ravel()
    before = 2 * keys * config.linear_key_head_dim
    if module in ("in_proj_qkv", "conv1d"):
        return np.concatenate([value[:before], value[before:][wide]])
    if module == "in_proj_z":
        return value[wide]
    if module == "out_proj":
        return value[:, wide]
    if module in ("in_proj_a", "in_proj_b") or suffix in ("A_log", "dt_bias"):
        return value[order]
    return value
