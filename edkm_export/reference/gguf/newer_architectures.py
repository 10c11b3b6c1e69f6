"""Dense models of 2024 and later, most of them Llama with a twist."""

from __future__ import annotations

from typing import Any

from edkm_export.reference.gguf.described import (
    Described,
    biases,
    common,
    layer_norms,
    no_window,
    one_width,
    rms_norms,
    rotation,
    slides,
)
from edkm_export.reference.gguf.gguf_file import GgufFile
from edkm_export.reference.gguf.gguf_settings import GgufSettings

__all__ = [
    "cohere2",
    "exaone4",
    "granite",
    "hunyuan",
    "mistral3",
    "olmo",
    "smollm3",
    "stablelm",
    "starcoder2",
]

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_STATE_SPACE = ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank")
"""What the converter writes of Granite 4, whether or not it has such layers."""
_EXAONE4_32B_LAYERS = 64  # by which llama.cpp knows the model with a sliding window


def cohere2(settings: GgufSettings, file: GgufFile) -> Described:
    """Command R7B. llama.cpp turns neighbouring channels, as the model does, so that no row was moved."""
    config = common(settings, file, scaled=True) | layer_norms(settings, "layer_norm_eps")
    one_width(settings, config)
    found = rotation(settings, file, config)
    if not config["tie_word_embeddings"]:
        settings.not_understood["output.weight"] = "llama.cpp takes the embedding for the head in cohere2"
    _same_base(settings, found.parameters)
    config |= {
        "rope_parameters": found.parameters,
        "logit_scale": settings.positive("logit_scale"),
        "sliding_window": settings.integer("attention.sliding_window", low=1),
        "layer_types": slides(settings, config["num_hidden_layers"], 4),
        "attention_bias": False,
    }
    return Described("cohere2", config, found.tensors)


def exaone4(settings: GgufSettings, file: GgufFile) -> Described:
    """The window has its key, but llama.cpp applies it to models of 64 layers alone."""
    config = common(settings, file) | rms_norms(settings)
    one_width(settings, config)
    found = rotation(settings, file, config, factors=True)
    layers = config["num_hidden_layers"]
    if layers == _EXAONE4_32B_LAYERS:
        _same_base(settings, found.parameters)
        config["sliding_window"] = settings.integer("attention.sliding_window", 4096, low=1)
        config["layer_types"] = slides(settings, layers, 4)
    else:
        if settings.integer("attention.sliding_window", 0):
            settings.refuse(
                "attention.sliding_window",
                f"llama.cpp attends to all tokens in models of {layers} layers, so the file has two readings",
            )
        settings.ignore("attention.sliding_window_pattern", "no layer slides")
        settings.ignore("rope.freq_base_swa", "no layer slides")
        config |= {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    config["rope_parameters"] = found.parameters
    return Described("exaone4", config, found.tensors)


def granite(settings: GgufSettings, file: GgufFile) -> Described:
    """Granite 3, and Granite 4 where all layers attend and none has experts."""
    config = common(settings, file, scaled=True) | rms_norms(settings)
    no_window(settings, config["max_position_embeddings"])
    if not settings.flag("rope.scaling.finetuned", True):
        settings.refuse("rope.scaling.finetuned", "false, which is a model without positions here")
    for name in _STATE_SPACE:
        settings.ignore(f"ssm.{name}", "no layer has a state space")
    settings.ignore("expert_shared_feed_forward_length", "there are no experts")
    found = rotation(settings, file, config, factors=True)
    config |= {
        "rope_parameters": found.parameters,
        "embedding_multiplier": settings.positive("embedding_scale", 1.0),
        "attention_multiplier": settings.positive("attention.scale", config["head_dim"] ** -0.5),
        "residual_multiplier": settings.positive("residual_scale", 1.0),
        "logits_scaling": settings.positive("logit_scale"),
        "attention_bias": biases(file, *_ATTENTION),
        "mlp_bias": biases(file, *_MLP),
    }
    return Described("granite", config, found.tensors)


def hunyuan(settings: GgufSettings, file: GgufFile) -> Described:
    """The base of the rotation is written as the model's `alpha` has stretched it."""
    config = common(settings, file) | rms_norms(settings)
    no_window(settings, config["max_position_embeddings"])
    found = rotation(settings, file, config)
    config |= {"rope_parameters": found.parameters, "attention_bias": False}
    return Described("hunyuan_v1_dense", config, found.tensors)


def mistral3(settings: GgufSettings, file: GgufFile) -> Described:
    """Mistral Small 3 is a Llama; queries of Ministral 3 grow with the logarithm of their position."""
    config = common(settings, file) | rms_norms(settings)
    no_window(settings, config["max_position_embeddings"])
    found = rotation(settings, file, config, factors=True, log_multiplier=True)
    config["rope_parameters"] = found.parameters
    growth = settings.number("attention.temperature_scale", 0.0)
    if not growth:
        config["attention_bias"] = biases(file, *_ATTENTION)
        config["mlp_bias"] = biases(file, *_MLP)
        return Described("llama", config, found.tensors)
    if found.parameters["rope_type"] != "yarn" or growth < 0:
        settings.refuse(
            "attention.temperature_scale",
            f"is {growth}, and a scale that grows needs a rope.scaling.type of yarn",
        )
    config["rope_parameters"] = found.parameters | {"llama_4_scaling_beta": growth}
    return Described("ministral3", config, found.tensors)


def olmo(settings: GgufSettings, file: GgufFile) -> Described:
    """OLMo 3 is an OLMo 2 with a window; its sliding layers leave scaling of the rotation out."""
    config = common(settings, file) | rms_norms(settings)
    one_width(settings, config)
    found = rotation(settings, file, config)
    config |= {"rope_parameters": found.parameters, "attention_bias": False}
    window = settings.integer("attention.sliding_window", 0)
    if not window:
        settings.ignore("attention.sliding_window_pattern", "no layer slides")
        settings.ignore("rope.freq_base_swa", "no layer slides")
        return Described("olmo2", config, found.tensors)
    _same_base(settings, found.parameters)
    plain = {"rope_type": "default", "rope_theta": found.parameters["rope_theta"]}
    config |= {
        "rope_parameters": {"full_attention": found.parameters, "sliding_attention": plain},
        "sliding_window": window,
        "layer_types": slides(settings, config["num_hidden_layers"], 4),
    }
    return Described("olmo3", config, found.tensors)


def smollm3(settings: GgufSettings, file: GgufFile) -> Described:
    """Every fourth layer knows no positions, for which there is no key."""
    config = common(settings, file) | rms_norms(settings)
    no_window(settings, config["max_position_embeddings"])
    found = rotation(settings, file, config)
    layers = config["num_hidden_layers"]
    config |= {
        "rope_parameters": found.parameters,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)],
        "layer_types": ["full_attention"] * layers,
        "use_sliding_window": False,
        "attention_bias": biases(file, *_ATTENTION),
        "mlp_bias": biases(file, *_MLP),
    }
    return Described("smollm3", config, found.tensors)


def stablelm(settings: GgufSettings, file: GgufFile) -> Described:
    """Attention and MLP lie side by side where there is no norm between them, whatever the key says."""
    config = common(settings, file) | layer_norms(settings, "layer_norm_eps")
    one_width(settings, config)
    no_window(settings, config["max_position_embeddings"])
    found = rotation(settings, file, config, part=True)
    parameters = {"partial_rotary_factor": 1.0, **found.parameters}
    settings.ignore("use_parallel_residual", "llama.cpp goes by the norms that the file holds")
    config |= {
        "rope_parameters": parameters,
        "use_qkv_bias": biases(file, "attn_q"),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
    }
    del config["head_dim"]
    return Described("stablelm", config, found.tensors)


def starcoder2(settings: GgufSettings, file: GgufFile) -> Described:
    """llama.cpp knows no window here, and its converter writes none."""
    config = common(settings, file) | layer_norms(settings, "norm_epsilon")
    one_width(settings, config)
    no_window(settings, config["max_position_embeddings"])
    found = rotation(settings, file, config)
    config |= {
        "rope_parameters": found.parameters,
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "sliding_window": None,
    }
    return Described("starcoder2", config, found.tensors)


def _same_base(settings: GgufSettings, parameters: dict[str, Any]) -> None:
    """A base of its own for sliding layers, which the transformers model has not."""
    own = settings.positive("rope.freq_base_swa", parameters["rope_theta"])
    if own != parameters["rope_theta"]:
        settings.refuse(
            "rope.freq_base_swa", f"another base for sliding layers is not supported in {settings.arch}"
        )
