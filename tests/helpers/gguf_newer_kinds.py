"""The kinds of GGUF files of newer families; see `gguf_kinds`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.gguf_kinds import LLAMA3, YARN, Kind, drop, put, rope, with_tensor
from tests.helpers.gguf_writer import Content

__all__ = ["NEWER"]

_FULL, _SLIDES = "full_attention", "sliding_attention"
_MIXED = {"layer_types": [_FULL, _SLIDES, _FULL, _SLIDES, _FULL]}
_EXAONE_32B: dict[str, Any] = {
    "num_hidden_layers": 64,
    "sliding_window": 6,
    "layer_types": ([_SLIDES] * 3 + [_FULL]) * 16,
}
_YARN_IN_FULL_LAYERS = {
    "rope_parameters": {
        "full_attention": YARN["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}


def _positive_decay(made: Content) -> None:
    made.tensors["blk.0.ssm_a"] = np.abs(made.tensors["blk.0.ssm_a"])


NEWER: dict[str, Kind] = {
    "cohere2": Kind("cohere2"),
    "cohere2, other factor of logits": Kind("cohere2", {"logit_scale": 0.125}),
    "cohere2, pattern of its own": Kind(
        "cohere2", _MIXED, put(attention__sliding_window_pattern=[False, True, False, True, False])
    ),
    "exaone4": Kind("exaone4"),
    "exaone4, tied": Kind("exaone4", {"tie_word_embeddings": True}),
    "exaone4, llama3": Kind("exaone4", rope("llama3", factor=16.0, **LLAMA3, rope_theta=1e6)),
    "exaone4 32B": Kind("exaone4", _EXAONE_32B),
    "granite": Kind("granite"),
    "granite, tied": Kind("granite", {"tie_word_embeddings": True}),
    "granite, no factors": Kind(
        "granite",
        {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 8**-0.5,
        },
        drop("granite.embedding_scale", "granite.residual_scale", "granite.attention.scale"),
    ),
    "granite, all biases": Kind("granite", {"attention_bias": True, "mlp_bias": True}),
    "granite 4": Kind("granitemoehybrid"),
    "hunyuan": Kind("hunyuan_v1_dense"),
    "hunyuan, tied": Kind("hunyuan_v1_dense", {"tie_word_embeddings": True}),
    "hunyuan, no alpha": Kind("hunyuan_v1_dense", rope("default")),
    "lfm2": Kind("lfm2"),
    "lfm2, longer kernel": Kind("lfm2", {"conv_L_cache": 4, "num_key_value_heads": 1}),
    "ministral3": Kind("ministral3"),
    "ministral3, tied": Kind("ministral3", {"tie_word_embeddings": True}),
    "olmo2": Kind("olmo2"),
    "olmo2, one head of keys": Kind("olmo2", {"num_key_value_heads": 1}),
    "olmo3": Kind("olmo3"),
    "olmo3, yarn": Kind("olmo3", _YARN_IN_FULL_LAYERS),
    "olmo3, pattern of its own": Kind("olmo3", _MIXED),
    "qwen35": Kind("qwen3_5_text"),
    "qwen35, as many values as keys": Kind("qwen3_5_text", _LINEAR),
    "qwen35, tied": Kind("qwen3_5_text", {"tie_word_embeddings": True}),
    "smollm3": Kind("smollm3"),
    "smollm3, own head": Kind("smollm3", {"tie_word_embeddings": False}),
    "smollm3, yarn": Kind("smollm3", YARN),
    "stablelm": Kind("stablelm"),
    "stablelm, biases": Kind("stablelm", {"use_qkv_bias": True}),
    "stablelm, side by side": Kind("stablelm", {"use_parallel_residual": True}),
    "starcoder2": Kind("starcoder2"),
    "starcoder2, own head": Kind("starcoder2", {"tie_word_embeddings": False}),
    # what must be refused
    "cohere2, own head": Kind(
        "cohere2", {"tie_word_embeddings": False}, refused="takes the embedding for the head"
    ),
    "cohere2, no window": Kind(
        "cohere2",
        change=drop("cohere2.attention.sliding_window"),
        refused="attention.sliding_window is missing",
    ),
    "cohere2, another base where layers slide": Kind(
        "cohere2", change=put(rope__freq_base_swa=500.0), refused="another base for sliding layers"
    ),
    "cohere2, factor of embeddings": Kind(
        "cohere2", change=put(embedding_scale=2.0), refused="cohere2.embedding_scale: is not known"
    ),
    "exaone4, a window in two layers": Kind(
        "exaone4", change=put(attention__sliding_window=6), refused="two readings"
    ),
    "granite, no positions": Kind(
        "granite", change=put(rope__scaling__finetuned=False), refused="a model without positions"
    ),
    "granite, no factor of logits": Kind(
        "granite", change=drop("granite.logit_scale"), refused="granite.logit_scale is missing"
    ),
    "granite, with Mamba": Kind(
        "granite",
        change=put(general__architecture="granitehybrid"),
        refused="'granitehybrid' is not supported",
    ),
    "hunyuan, biases": Kind(
        "hunyuan_v1_dense", {"attention_bias": True}, refused="has no place for this tensor"
    ),
    "lfm2, heads that differ": Kind(
        "lfm2", change=put(attention__head_count_kv=[0, 2, 1]), refused="is no list of 3 numbers"
    ),
    "lfm2, window": Kind("lfm2", change=put(attention__sliding_window=6), refused="no layers that slide"),
    "lfm2, biases of the convolution": Kind(
        "lfm2", {"conv_bias": True}, refused="has no place for this tensor"
    ),
    "ministral3, no yarn": Kind(
        "ministral3",
        change=put(rope__scaling__type="none", rope__scaling__factor=1.0),
        refused="needs a rope.scaling",
    ),
    "ministral3, length of its own": Kind(
        "ministral3", change=put(attention__temperature_length=8), refused="attention.temperature_length"
    ),
    "olmo2, biases": Kind("olmo2", {"attention_bias": True}, refused="has no place for this tensor"),
    "olmo2, narrow heads": Kind(
        "olmo2", change=put(attention__key_length=4, attention__value_length=4), refused="do not make 32"
    ),
    "qwen35, predicts several": Kind(
        "qwen3_5_text", change=put(nextn_predict_layers=1), refused="several tokens at once"
    ),
    "qwen35, sections that leave channels still": Kind(
        "qwen3_5_text", change=put(rope__dimension_sections=[32, 0, 0, 0]), refused="without positions"
    ),
    "qwen35, values of another size": Kind(
        "qwen3_5_text", {"linear_value_head_dim": 4}, refused="heads of 8 channels have another"
    ),
    "qwen35, decay that grows": Kind("qwen3_5_text", change=_positive_decay, refused="not below zero"),
    "smollm3, window": Kind("smollm3", change=put(attention__sliding_window=6), refused="two readings"),
    "smollm3, factors": Kind(
        "smollm3", change=with_tensor("rope_freqs.weight", 4, value=2.0), refused="rope_freqs.weight"
    ),
    "stablelm, norms of queries": Kind(
        "stablelm", change=with_tensor("blk.0.attn_q_norm.weight", 4, 8), refused="blk.0.attn_q_norm.weight"
    ),
    "starcoder2, no biases": Kind("starcoder2", {"use_bias": False}, refused="this tensor is missing"),
    "starcoder2, window": Kind("starcoder2", change=put(attention__sliding_window=6), refused="two readings"),
}
"""{kind: file}."""
