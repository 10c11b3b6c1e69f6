"""Which parameter of the transformers model each tensor of a file becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from edkm_export.reference.gguf.described import Architecture, Described

__all__ = ["InTurn", "Place", "places"]

Change = Literal["none", "interleaved", "transposed", "minus one", "convolution", "negative exponential"]


@dataclass(frozen=True)
class InTurn:
    """Heads of values that are stored in turn: the first of each head of keys, then the second of each, and so on.

    Attributes:
        keys: heads of keys.
        times: heads of values for each of them.
        size: elements of a head of values.
        first: elements before them.
        axis: along which they lie.
    """

    keys: int
    times: int
    size: int
    first: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Place:
    """Where a tensor goes.

    Attributes:
        parameter: name in the transformers model.
        change: what llama.cpp's converter did to it, to be undone.
        heads: of queries or keys, for "interleaved".
        optional: absent in all layers, it stands for zeros.
        in_turn: heads of values that the converter moved.
    """

    parameter: str
    change: Change = "none"
    heads: int = 1
    optional: bool = False
    in_turn: InTurn | None = None


_ATTENTION_OF_LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP_OF_LLAMA = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BLOCKS_OF_LLAMA = _ATTENTION_OF_LLAMA | _MLP_OF_LLAMA
_LLAMA_LAYER = _BLOCKS_OF_LLAMA | {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_LAYER = _LLAMA_LAYER | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
_POST_NORM_LAYER = _BLOCKS_OF_LLAMA | _POST_NORMS | _HEAD_NORMS
_LFM2_MLP = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
_QWEN35_MLP = _MLP_OF_LLAMA | {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}
_LAYERS = {
    "cohere2": _BLOCKS_OF_LLAMA | {"attn_norm": "input_layernorm"},
    "exaone4": _POST_NORM_LAYER,
    "gemma2": _GEMMA_LAYER,
    "gemma3_text": _GEMMA_LAYER | _HEAD_NORMS,
    "gpt2": {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    "granite": _LLAMA_LAYER,
    "hunyuan_v1_dense": _LLAMA_LAYER
    | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    "llama": _LLAMA_LAYER,
    "ministral3": _LLAMA_LAYER,
    "olmo2": _POST_NORM_LAYER,
    "olmo3": _POST_NORM_LAYER,
    "phi3": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "qwen2": _LLAMA_LAYER,
    "qwen3": _LLAMA_LAYER | _HEAD_NORMS,
    "smollm3": _LLAMA_LAYER,
    "stablelm": _LLAMA_LAYER,
    "starcoder2": _ATTENTION_OF_LLAMA
    | {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
}
_LAYERS_BY_KIND = {
    "lfm2": {
        "conv": _LFM2_MLP
        | {
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.conv": "conv.conv",
            "shortconv.out_proj": "conv.out_proj",
        },
        "full_attention": _LFM2_MLP
        | _ATTENTION_OF_LLAMA
        | {
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
        },
    },
    "qwen3_5_text": {
        "linear_attention": _QWEN35_MLP
        | {
            "attn_qkv": "linear_attn.in_proj_qkv",
            "attn_gate": "linear_attn.in_proj_z",
            "ssm_beta": "linear_attn.in_proj_b",
            "ssm_alpha": "linear_attn.in_proj_a",
            "ssm_conv1d": "linear_attn.conv1d",
            "ssm_norm": "linear_attn.norm",
            "ssm_out": "linear_attn.out_proj",
        },
        "full_attention": _QWEN35_MLP | _ATTENTION_OF_LLAMA | _HEAD_NORMS,
    },
}
_ATTENTION = tuple(_ATTENTION_OF_LLAMA)
_OUTER = {
    "gpt2": ("transformer", "h", "wte", "ln_f"),
    "lfm2": ("model", "layers", "embed_tokens", "embedding_norm"),
}
_FINAL_NORM = {"lfm2": "token_embd_norm"}
_LAYER_NORMS = ("gpt2", "stablelm", "starcoder2")  # with bias
_ALL_BIASES = ("gpt2", "starcoder2")


def places(architecture: Architecture, described: Described) -> dict[str, Place]:
    """{name of a tensor: its place}, for every tensor that the model may have.

    Args:
        architecture: of the file.
        described: the model that the file describes.
    """
    kind, config = described.model_type, described.config
    stack, layers, embedding, final = _OUTER.get(kind, ("model", "layers", "embed_tokens", "norm"))
    found = {"token_embd.weight": Place(f"{stack}.{embedding}.weight")}
    if kind == "gpt2":
        found["position_embd.weight"] = Place(f"{stack}.wpe.weight")
    if not config["tie_word_embeddings"]:
        found["output.weight"] = Place("lm_head.weight")
    stored = _FINAL_NORM.get(kind, "output_norm")
    found |= _of_module(architecture, described, stored, stored, f"{stack}.{final}")
    for layer in range(config["n_layer" if kind == "gpt2" else "num_hidden_layers"]):
        inner = f"{stack}.{layers}.{layer}"
        if kind in _LAYERS_BY_KIND:
            layer_type = config["layer_types"][layer]
            modules = _LAYERS_BY_KIND[kind][layer_type]
        else:
            layer_type, modules = "", _LAYERS[kind]
        for name, module in modules.items():
            if kind == "stablelm" and name == "ffn_norm" and config["use_parallel_residual"]:
                continue
            found |= _of_module(architecture, described, f"blk.{layer}.{name}", name, f"{inner}.{module}")
        if layer_type == "linear_attention":
            heads = _in_turn(config, 1)
            found[f"blk.{layer}.ssm_a"] = Place(
                f"{inner}.linear_attn.A_log", "negative exponential", in_turn=heads
            )
            found[f"blk.{layer}.ssm_dt.bias"] = Place(f"{inner}.linear_attn.dt_bias", in_turn=heads)
    return found


def _of_module(
    architecture: Architecture, described: Described, stored: str, name: str, parameter: str
) -> dict[str, Place]:
    """Weight, and bias where the configuration has one."""
    config, kind = described.config, described.model_type
    change: Change = "none"
    heads, in_turn = 1, None
    if name.endswith("norm"):
        change = "minus one" if architecture.norm_offset and name != "ssm_norm" else "none"
    elif kind == "gpt2":
        change = "transposed"
    elif name in ("shortconv.conv", "ssm_conv1d"):
        change = "convolution"
    elif architecture.interleaved and name in ("attn_q", "attn_k"):
        change = "interleaved"
        heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
    if kind == "qwen3_5_text":
        in_turn = _heads_of(config, name)
    found = {f"{stored}.weight": Place(f"{parameter}.weight", change, heads, in_turn=in_turn)}
    if name.endswith("norm"):
        if kind in _LAYER_NORMS:
            found[f"{stored}.bias"] = Place(f"{parameter}.bias")
    elif kind in _ALL_BIASES or (name in _ATTENTION[:3] and (kind == "qwen2" or config.get("use_qkv_bias"))):
        found[f"{stored}.bias"] = Place(f"{parameter}.bias")
    elif config.get("attention_bias") and name in _ATTENTION:
        found[f"{stored}.bias"] = Place(f"{parameter}.bias", change, heads, optional=True)
    elif config.get("mlp_bias") and name in _MLP_OF_LLAMA:
        found[f"{stored}.bias"] = Place(f"{parameter}.bias", optional=True)
    return found


def _in_turn(config: dict[str, Any], size: int, first: int = 0, axis: int = 0) -> InTurn:
    keys = config["linear_num_key_heads"]
    return InTurn(keys, config["linear_num_value_heads"] // keys, size, first, axis)


def _heads_of(config: dict[str, Any], name: str) -> InTurn | None:
    """Which rows or columns of a linear attention's weight are heads of values."""
    size = config["linear_value_head_dim"]
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    if name in ("attn_qkv", "ssm_conv1d"):
        return _in_turn(config, size, first)
    if name == "attn_gate":
        return _in_turn(config, size)
    if name in ("ssm_beta", "ssm_alpha"):
        return _in_turn(config, 1)
    return _in_turn(config, size, axis=1) if name == "ssm_out" else None
