"""Small random models of each family that GGUF files are written of, in float32."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import torch

VOCABULARY = 272
"""The three special tokens, 256 bytes, the space, and some more."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "sliding_window": None},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 3},
    "cohere2": {"sliding_window": 6, "num_hidden_layers": 5, "logit_scale": 0.5},
    "exaone4": {"head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "granitemoehybrid": {
        "shared_intermediate_size": 48,
        "num_local_experts": 0,
        "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "hunyuan_v1_dense": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "block_auto_adjust_ff_dim": False,
    },
    "ministral3": {
        "head_dim": 16,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 5, "sliding_window": 6},
    "qwen3_5_text": {
        "num_hidden_layers": 5,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "smollm3": {"num_hidden_layers": 5, "use_sliding_window": False},
    "stablelm": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    },
    "starcoder2": {"sliding_window": None},
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@contextlib.contextmanager
def _quiet():
    """transformers warns of settings that are right."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def tiny(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model whose logits spread widely, so that any change of its computation shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _GPT2 if family == "gpt2" else _COMMON | _FAMILIES[family]
    settings = copy.deepcopy(settings | changes)  # a config completes its RoPE parameters in place
    with _quiet():
        config = AutoConfig.for_model(family, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    gemma = family.startswith("gemma")
    offset = gemma or family == "qwen3_5_text"  # norms multiply by one plus their weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                embedding = "embed" in name or ".wte." in name
                # small in Gemma, which scales embeddings up, lest each token expects itself
                spread = (0.3 if gemma else 1.0) if embedding else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(noise * (0.3 if ".wpe." in name else spread))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 3 or name.endswith("A_log"):  # kernels of convolutions, and decays
                parameter.copy_(0.5 * noise)
            else:
                centre = 0 if offset and not name.endswith("linear_attn.norm.weight") else 1
                parameter.copy_(0.3 * noise + centre)
    return model.eval().requires_grad_(False)


def text(length: int = 40, seed: int = 1) -> torch.Tensor:
    """Random tokens, int64 [1, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, length), generator=generator)


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [length, vocabulary]."""
    with _quiet():
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest Kullback-Leibler divergence of any position."""
    expected, found = expected.double(), found.double()
    return float((expected.exp() * (expected - found)).sum(-1).max())


def agreement(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Share of positions with the same most probable token."""
    return float((expected.argmax(-1) == found.argmax(-1)).float().mean())
