"""Small random models of every family, in odd shapes, for comparison with transformers' own.

`build("gemma3: odd")` gives a model. Norm weights and biases are random too: with the usual ones and zeros, a
decoder that forgot them would pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers

from edkm_export.checkpoint import Checkpoint

__all__ = ["CASES", "EXPORTED", "build", "build_case", "checkpoint_of"]

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 96,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_HEAD = {"num_key_value_heads": 1, "head_dim": 10, "hidden_size": 36, "intermediate_size": 20}
_LFM2: dict[str, Any] = {
    **{key: size for key, size in _SIZES.items() if key != "head_dim"},
    "intermediate_size": 72,
    "block_multiple_of": 16,
}
_QWEN35: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MIXED = ["sliding_attention", "full_attention"]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
    "partial_rotary_factor": 0.75,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "llama: gelu": ("llama", {**_SIZES, "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_SIZES, "sliding_window": 7}),
    "mistral: no window": ("mistral", {**_SIZES, **_ONE_HEAD, "sliding_window": None}),
    "qwen2": ("qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2: windows": (
        "qwen2",
        {**_SIZES, **_ONE_HEAD, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3: windows and biases": (
        "qwen3",
        {
            **_SIZES,
            **_ONE_HEAD,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": _MIXED,
        },
    ),
    "gemma2": ("gemma2", {**_SIZES, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma2: no caps": (
        "gemma2",
        {
            **_SIZES,
            **_ONE_HEAD,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 9,
            "layer_types": _MIXED[::-1],
        },
    ),
    "gemma2: low caps": (
        "gemma2",
        {**_SIZES, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "sliding_window": 1},
    ),
    "gemma3": ("gemma3_text", {**_SIZES, "sliding_window": 6, "sliding_window_pattern": 2}),
    "gemma3: scaled RoPE": (
        "gemma3_text",
        {
            **_SIZES,
            **_ONE_HEAD,
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "lfm2": (
        "lfm2",
        {**_LFM2, "layer_types": ["conv", "full_attention"]},
    ),
    "lfm2: odd": (
        "lfm2",
        {
            **_LFM2,
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_hidden_layers": 3,
            "conv_L_cache": 4,
            "block_multiple_of": 20,
            "block_ffn_dim_multiplier": 1.3,
            "layer_types": ["full_attention", "conv", "conv"],
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5": ("qwen3_5_text", {**_SIZES, **_QWEN35}),
    "qwen3_5: odd": (
        "qwen3_5_text",
        {
            **_SIZES,
            **_ONE_HEAD,
            **_QWEN35,
            "head_dim": 12,
            "num_hidden_layers": 3,
            "linear_conv_kernel_dim": 3,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {**_SIZES, "sliding_window": 11}),
    "phi3: longrope": (
        "phi3",
        {
            **_SIZES,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 48,
            "max_position_embeddings": 192,
            "tie_word_embeddings": True,
            "rope_parameters": _LONGROPE,
        },
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt2: odd": (
        "gpt2",
        {
            **_GPT2,
            "n_embd": 27,
            "n_head": 3,
            "n_inner": 40,
            "activation_function": "relu",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
        },
    ),
}
"""{case: (model type, arguments of its configuration)}"""

EXPORTED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "lfm2", "qwen3_5")
"""One case a family whose sizes are also good for palettes of 16 rows."""


def build(case: str, seed: int = 0) -> Any:
    """A random model of a case of `CASES`: float32, in eval mode, the same for the same seed."""
    return build_case(*CASES[case], seed=seed)


def build_case(kind: str, given: dict[str, Any], seed: int = 0) -> Any:
    """A random model of a model type and the arguments of its configuration."""
    arguments = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    deviation = 1 / math.sqrt(given.get("hidden_size", given.get("n_embd")))  # unit gain of each layer
    config = transformers.AutoConfig.for_model(kind, **arguments, initializer_range=deviation)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        centre = 0.0 if kind.startswith("gemma") else 1.0  # Gemma's norms multiply by one plus their weight
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif name.endswith("A_log"):
                parameter.uniform_(-5, 1)  # heads that remember two tokens, and others that remember hundreds
            elif parameter.dim() == 1:
                parameter.uniform_(centre - 0.5, centre + 0.5)
    return model.float().eval()


def checkpoint_of(model: Any) -> Checkpoint:
    """All parameters dense, those of transformers' Conv1D turned."""
    from transformers.pytorch_utils import Conv1D

    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    names: dict[int, str] = {}
    dense, tied = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first == name:
            dense[name] = (parameter.detach().t() if name in turned else parameter.detach()).contiguous()
        else:
            tied[name] = first
    return Checkpoint(config=model.config.to_dict(), palettized={}, dense=dense, tied=tied)
