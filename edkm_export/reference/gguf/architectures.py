"""Which configuration of transformers a file describes, architecture by architecture.

What a key means, and what holds when it is missing, is llama.cpp's to say: the files were made for it. Where
llama.cpp passes over a key of an architecture, and the key says something else, the file has two readings and is
refused.
"""

from __future__ import annotations

from typing import Any

from edkm_export.reference.gguf import hybrid_architectures as hybrid
from edkm_export.reference.gguf import newer_architectures as newer
from edkm_export.reference.gguf.described import (
    Architecture,
    Described,
    biases,
    common,
    no_window,
    one_width,
    rms_norms,
    rotation,
    slides,
)
from edkm_export.reference.gguf.gguf_file import GgufFile
from edkm_export.reference.gguf.gguf_settings import GgufSettings

__all__ = ["ARCHITECTURES"]

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def _llama(settings: GgufSettings, file: GgufFile) -> Described:
    config = common(settings, file) | rms_norms(settings)
    no_window(settings, config["max_position_embeddings"])
    found = rotation(settings, file, config, factors=True)
    config["rope_parameters"] = found.parameters
    config["attention_bias"] = biases(file, "attn_q", "attn_k", "attn_v", "attn_output")
    config["mlp_bias"] = biases(file, "ffn_gate", "ffn_up", "ffn_down")
    return Described("llama", config, found.tensors)


def _qwen(settings: GgufSettings, file: GgufFile) -> Described:
    config = common(settings, file) | rms_norms(settings)
    no_window(settings, config["max_position_embeddings"])
    found = rotation(settings, file, config)
    config |= {"rope_parameters": found.parameters, "use_sliding_window": False, "sliding_window": None}
    if settings.arch == "qwen3":
        config["attention_bias"] = biases(file, "attn_q", "attn_k", "attn_v", "attn_output")
    return Described(settings.arch, config, found.tensors)


def _phi3(settings: GgufSettings, file: GgufFile) -> Described:
    """The window is the model's own. llama.cpp leaves it out and warns that this is not the model."""
    config = common(settings, file) | rms_norms(settings)
    found = rotation(settings, file, config, factors=True, part=True)
    config["rope_parameters"] = found.parameters
    config["original_max_position_embeddings"] = settings.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"], low=1
    )
    config["sliding_window"] = settings.integer("attention.sliding_window", 0) or None
    return Described("phi3", config, found.tensors)


def _gpt2(settings: GgufSettings, file: GgufFile) -> Described:
    found = common(settings, file)
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if found["num_key_value_heads"] != heads:
        settings.refuse("attention.head_count_kv", "this architecture has as many of keys as of queries")
    one_width(settings, found)
    return Described(
        "gpt2",
        {
            "vocab_size": found["vocab_size"],
            "n_positions": found["max_position_embeddings"],
            "n_embd": hidden,
            "n_layer": found["num_hidden_layers"],
            "n_head": heads,
            "n_inner": found["intermediate_size"],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": settings.positive("attention.layer_norm_epsilon"),
            **{name: found[name] for name in found if name.endswith("_token_id")},
            "tie_word_embeddings": found["tie_word_embeddings"],
        },
    )


def _gemma(settings: GgufSettings, file: GgufFile, layers_27b: int) -> dict[str, Any]:
    """What both generations share. The scale of queries has no key: llama.cpp knows the 27B by its layers."""
    config = common(settings, file) | rms_norms(settings)
    largest = config["num_hidden_layers"] == layers_27b
    width = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return config | {"query_pre_attn_scalar": width, "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(settings: GgufSettings, file: GgufFile) -> Described:
    config = _gemma(settings, file, _GEMMA2_27B_LAYERS)
    found = rotation(settings, file, config)
    same = settings.positive("rope.freq_base_swa", found.parameters["rope_theta"])
    if same != found.parameters["rope_theta"]:
        settings.refuse("rope.freq_base_swa", "another base for sliding layers is not supported in gemma2")
    config |= {
        "rope_parameters": found.parameters,
        "attn_logit_softcapping": settings.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.positive("final_logit_softcapping", 30.0),
        "sliding_window": settings.integer("attention.sliding_window", 4096, low=1),
        "layer_types": slides(settings, config["num_hidden_layers"], 2),
    }
    return Described("gemma2", config, found.tensors)


def _gemma3(settings: GgufSettings, file: GgufFile) -> Described:
    config = _gemma(settings, file, _GEMMA3_27B_LAYERS)
    layers = config["num_hidden_layers"]
    found = rotation(settings, file, config)
    if found.parameters["rope_type"] not in ("default", "linear"):
        settings.refuse("rope.scaling.type", "only a linear scaling is supported in gemma3")
    sliding = {"rope_type": "default", "rope_theta": settings.positive("rope.freq_base_swa", 10000.0)}
    window = settings.integer("attention.sliding_window", 0)
    kinds = slides(settings, layers, 6) if window else ["full_attention"] * layers
    if not window:
        settings.ignore("rope.freq_base_swa", "no layer slides")
        settings.ignore("attention.sliding_window_pattern", "no layer slides")
    config |= {
        "rope_parameters": {"full_attention": found.parameters, "sliding_attention": sliding},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": settings.positive("final_logit_softcapping", None),
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": kinds,
    }
    return Described("gemma3_text", config, found.tensors)


ARCHITECTURES = {
    "cohere2": Architecture(newer.cohere2),
    "exaone4": Architecture(newer.exaone4),
    "gemma2": Architecture(_gemma2, norm_offset=True),
    "gemma3": Architecture(_gemma3, norm_offset=True),
    "gpt2": Architecture(_gpt2),
    "granite": Architecture(newer.granite, interleaved=True),
    "hunyuan-dense": Architecture(newer.hunyuan),
    "lfm2": Architecture(hybrid.lfm2),
    "llama": Architecture(_llama, interleaved=True),
    "mistral3": Architecture(newer.mistral3, interleaved=True),
    "olmo2": Architecture(newer.olmo),
    "phi3": Architecture(_phi3),
    "qwen2": Architecture(_qwen),
    "qwen3": Architecture(_qwen),
    "qwen35": Architecture(hybrid.qwen35, norm_offset=True),
    "smollm3": Architecture(newer.smollm3, interleaved=True),
    "stablelm": Architecture(newer.stablelm),
    "starcoder2": Architecture(newer.starcoder2),
}
"""{name in the file: what is known of it}."""
