"""Which parameter of the transformers model each tensor of a file becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from edkm_export.reference.gguf.architectures import Architecture

__all__ = ["Place", "places"]

Change = Literal["none", "interleaved", "transposed", "minus one"]


@dataclass(frozen=True)
class Place:
    """Where a tensor goes.

    Attributes:
        parameter: name in the transformers model.
        change: what llama.cpp's converter did to it, to be undone.
        heads: of queries or keys, for "interleaved".
        optional: absent in all layers, it stands for zeros.
    """

    parameter: str
    change: Change = "none"
    heads: int = 1
    optional: bool = False


_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_LAYER = _LLAMA_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS = {
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
    "llama": _LLAMA_LAYER,
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
}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


def places(architecture: Architecture, config: dict[str, Any]) -> dict[str, Place]:
    """{name of a tensor: its place}, for every tensor that the model may have.

    Args:
        architecture: of the file.
        config: arguments of the configuration that the file describes.
    """
    kind = architecture.model_type
    gpt2 = kind == "gpt2"
    stack, layers = ("transformer", "h") if gpt2 else ("model", "layers")
    found = {"token_embd.weight": Place(f"{stack}.{'wte' if gpt2 else 'embed_tokens'}.weight")}
    if gpt2:
        found["position_embd.weight"] = Place(f"{stack}.wpe.weight")
    if not config["tie_word_embeddings"]:
        found["output.weight"] = Place("lm_head.weight")
    norm: Change = "minus one" if architecture.norm_offset else "none"
    final = f"{stack}.{'ln_f' if gpt2 else 'norm'}"
    found["output_norm.weight"] = Place(f"{final}.weight", norm)
    if gpt2:
        found["output_norm.bias"] = Place(f"{final}.bias")
    for layer in range(config["n_layer" if gpt2 else "num_hidden_layers"]):
        for name, module in _LAYERS[kind].items():
            parameter = f"{stack}.{layers}.{layer}.{module}"
            found |= _of_module(architecture, config, f"blk.{layer}.{name}", name, parameter)
    return found


def _of_module(
    architecture: Architecture, config: dict[str, Any], stored: str, name: str, parameter: str
) -> dict[str, Place]:
    """Weight, and bias where the configuration has one."""
    change: Change = "none"
    heads = 1
    if name.endswith("norm"):
        change = "minus one" if architecture.norm_offset else "none"
    elif architecture.model_type == "gpt2":
        change = "transposed"
    elif architecture.interleaved and name in ("attn_q", "attn_k"):
        change = "interleaved"
        heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
    found = {f"{stored}.weight": Place(f"{parameter}.weight", change, heads)}
    kind = architecture.model_type
    if kind == "gpt2" or (kind == "qwen2" and name in _ATTENTION[:3]):
        found[f"{stored}.bias"] = Place(f"{parameter}.bias")
    elif config.get("attention_bias") and name in _ATTENTION:
        found[f"{stored}.bias"] = Place(f"{parameter}.bias", change, heads, optional=True)
    elif config.get("mlp_bias") and name in ("ffn_gate", "ffn_up", "ffn_down"):
        found[f"{stored}.bias"] = Place(f"{parameter}.bias", optional=True)
    return found
