"""GGUF files of transformers models, as llama.cpp's converter would write them.

Own code, from the format and from what the converter does; it shares nothing with the reader. What keeps both honest
is llama.cpp, which reads these files in the tests with the marker `llamacpp`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.helpers.gguf_newer import in_turn, newer_settings

ARCHITECTURES = {
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "granite": "granite",
    "granitemoehybrid": "granite",
    "hunyuan_v1_dense": "hunyuan-dense",
    "lfm2": "lfm2",
    "llama": "llama",
    "ministral3": "mistral3",
    "mistral": "llama",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_5_text": "qwen35",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
_LIKE_LLAMA = ("granite", "llama", "mistral3", "smollm3")
"""Architectures whose converter laces the halves of the heads of queries and keys."""
_MODULES = {
    "embed_tokens": "token_embd",
    "wte": "token_embd",
    "wpe": "position_embd",
    "norm": "output_norm",
    "ln_f": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "qkv_proj": "attn_qkv",
    "c_attn": "attn_qkv",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "c_fc": "ffn_up",
    "down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "query_layernorm": "attn_q_norm",
    "key_layernorm": "attn_k_norm",
    "q_layernorm": "attn_q_norm",
    "k_layernorm": "attn_k_norm",
    "embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "in_proj": "shortconv.in_proj",
    "conv": "shortconv.conv",
    "in_proj_qkv": "attn_qkv",
    "in_proj_z": "attn_gate",
    "in_proj_a": "ssm_alpha",
    "in_proj_b": "ssm_beta",
    "conv1d": "ssm_conv1d",
    "output_linear": "ffn_down",
}
_OUT_PROJ = {"self_attn": "attn_output", "conv": "shortconv.out_proj", "linear_attn": "ssm_out"}
_BEHIND_ATTENTION = ("exaone4", "gemma2", "gemma3", "olmo2", "qwen35")
"""Architectures in which `post_attention_layernorm` is stored as `post_attention_norm`."""


@dataclass
class Content:
    """What a file will hold; tests change it before it is written.

    Attributes:
        metadata: {key: value}; whole numbers become uint32, others float32.
        tensors: {name: float32 values, or packed blocks}.
        kinds: {name: quantization type}, float32 where not named.
    """

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]
    kinds: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Content:
        return replace(self, metadata=dict(self.metadata), tensors=dict(self.tensors), kinds=dict(self.kinds))


def content(model: Any, *, arch: str | None = None, vocabulary: bool = True) -> Content:
    """Metadata and tensors of a model, all in float32.

    Args:
        model: a transformers model of one of the families.
        arch: architecture of llama.cpp, where a family has two.
        vocabulary: with tokens of single bytes.
    """
    config = model.config
    arch = arch or ARCHITECTURES[config.model_type]
    rope = _rope_parameters(config)
    metadata = {"general.architecture": arch, "general.type": "model", "general.name": "tiny"}
    metadata |= {f"{arch}.{key}": value for key, value in _settings(config, arch, rope).items()}
    metadata |= {"general.file_type": 0, "general.quantization_version": 2}
    if vocabulary:
        metadata |= _byte_vocabulary(config.vocab_size)
    tensors = _tensors(model, arch)
    tensors |= _factors(rope, config)
    return Content(metadata, tensors)


def _rope_parameters(config: Any) -> dict[str, Any]:
    given = getattr(config, "rope_parameters", None) or {}
    return given.get("full_attention", given)


def _settings(config: Any, arch: str, rope: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes under the architecture's name."""
    if arch == "gpt2":
        return {
            "block_count": config.n_layer,
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "shared_intermediate_size", config.intermediate_size),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **_epsilon(config),
    }
    width = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width
    if arch in ("gemma2", "gemma3", "qwen3", "qwen35") or head_dim != width:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in _LIKE_LLAMA:
        found |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}
    if arch not in ("gemma2", "stablelm"):
        found["rope.freq_base"] = float(rope["rope_theta"])
    if arch == "phi3":
        found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        found["attention.sliding_window"] = config.sliding_window or 0
        found["rope.scaling.original_context_length"] = rope.get(
            "original_max_position_embeddings", config.max_position_embeddings
        )
    if arch == "gemma2":
        found |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            "attention.sliding_window": config.sliding_window,
        }
    if arch == "gemma3":
        if "sliding_attention" in config.layer_types:
            found["attention.sliding_window"] = config.sliding_window
            found["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            found["final_logit_softcapping"] = config.final_logit_softcapping
    return found | _scaling(rope) | newer_settings(config, arch, head_dim, rope)


def _epsilon(config: Any) -> dict[str, float]:
    for name in ("rms_norm_eps", "norm_eps"):
        if hasattr(config, name):
            return {"attention.layer_norm_rms_epsilon": getattr(config, name)}
    names = ("layer_norm_eps", "norm_epsilon")
    (value,) = (getattr(config, name) for name in names if hasattr(config, name))
    return {"attention.layer_norm_epsilon": value}


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if kind == "longrope":
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.attn_factor": float(rope["attention_factor"]),
        }
    return {}


def _factors(rope: dict[str, Any], config: Any) -> dict[str, np.ndarray]:
    """Tensors of rotary factors, shape [rotating channels / 2]."""
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(rope["short_factor"], np.float32),
        }
    if kind != "llama3":
        return {}
    import torch

    dim, base = config.head_dim, rope["rope_theta"]
    factor, low, high = (rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        length = 2 * torch.pi / frequency
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(factor)
        else:
            part = (original / length - low) / (high - low)
            factors.append(float(1 / ((1 - part) / factor + part)))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    config = model.config
    found = {}
    for name, parameter in model.named_parameters():  # tied ones once
        value = parameter.detach().float().numpy()
        parts = name.split(".")
        module, suffix = parts[-2], parts[-1]
        if arch == "qwen35" and "linear_attn" in parts:
            value = in_turn(value, config, module, suffix)
        if module == "input_linear":
            layer = parts[2]
            for half, rows in zip(("gate", "up"), np.split(value, 2), strict=True):
                found[f"blk.{layer}.ffn_{half}.weight"] = np.ascontiguousarray(rows)
            continue
        stored = _stored_name(parts, arch)
        layer = next((part for part in parts if part.isdigit()), None)
        if layer is not None:
            stored = f"blk.{layer}.{stored}"
        if value.ndim == 3:  # the kernel of a convolution
            value = value[:, 0]
        if arch.startswith(("gemma", "qwen35")) and stored.endswith("norm") and "linear_attn" not in parts:
            value = value + np.float32(1)
        if arch == "gpt2" and suffix == "weight" and module in ("c_attn", "c_proj", "c_fc"):
            value = value.T
        if arch in _LIKE_LLAMA and module in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
            # the two halves of each head are laced into one another
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if suffix == "A_log":
            found[stored] = -np.exp(value)
            continue
        if suffix == "dt_bias":
            suffix = "bias"
        found[f"{stored}.{suffix}"] = np.ascontiguousarray(value)
    return found


def _stored_name(parts: list[str], arch: str) -> str:
    """Of a parameter, without the number of its layer and what it ends in."""
    module, parent = parts[-2], parts[-3] if len(parts) > 2 else ""
    if module == "linear_attn":
        return {"A_log": "ssm_a", "dt_bias": "ssm_dt"}[parts[-1]]
    if module == "norm" and parent == "linear_attn":
        return "ssm_norm"
    if module == "out_proj":
        return _OUT_PROJ[parent]
    if module == "c_proj":
        return "attn_output" if parent == "attn" else "ffn_down"
    if module == "post_attention_layernorm":
        return "post_attention_norm" if arch in _BEHIND_ATTENTION else "ffn_norm"
    return _MODULES[module]


def _byte_vocabulary(size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary of single bytes, and of the space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    types = [2, 3, 3] + [6] * 256 + [1]
    for number in range(len(tokens), size):
        tokens.append(f"[PAD{number}]")
        types.append(5)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens[:size],
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": types[:size],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def quantize(made: Content, kind: str, *, seed: int = 0) -> Content:
    """The same with its matrices in another type. Types that cannot be made here get random blocks."""
    found = made.copy()
    generator = np.random.default_rng(seed)
    for name, values in made.tensors.items():
        if values.ndim != 2 or name == "position_embd.weight":
            continue
        found.kinds[name] = kind
        if kind in ("F16", "BF16"):
            found.tensors[name] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
            continue
        try:
            found.tensors[name] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        except NotImplementedError:
            found.tensors[name] = _random_blocks(values.shape, kind, generator)
    return found


# First byte of the float16 scales in a block.
_SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def _random_blocks(shape: tuple[int, ...], kind: str, generator: np.random.Generator) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows, count = shape[0], shape[1] // block
    blocks = generator.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for start in _SCALES[kind]:
        scale = generator.uniform(0.5, 1, (rows, count, 1)).astype(np.float16) / np.float16(16)
        blocks[:, :, start : start + 2] = scale.view(np.uint8)
    packed = blocks.reshape(rows, count * size)
    spread = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]).std()
    for start in _SCALES[kind]:  # now of the size that weights have
        scale = np.ascontiguousarray(blocks[:, :, start : start + 2]).view(np.float16)
        scale = (scale * np.float32(shape[1] ** -0.5 / spread)).astype(np.float16)
        blocks[:, :, start : start + 2] = scale.view(np.uint8)
    return packed


def dequantize(made: Content) -> Content:
    """The same with all tensors decoded to float32."""
    found = made.copy()
    for name, kind in made.kinds.items():
        found.tensors[name] = gguf.quants.dequantize(made.tensors[name], gguf.GGMLQuantizationType[kind])
    found.kinds = {}
    return found


def write(made: Content, path: Path, *, parts: int = 1) -> Path:
    """Write a file, or the parts of a split one; returns the path of the first."""
    names = list(made.tensors)
    if parts == 1:
        _write_one(path, made.metadata, made, names)
        return path
    size = -(-len(names) // parts)
    paths = [path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf") for number in range(parts)]
    for number, part in enumerate(paths):
        metadata = dict(made.metadata) if number == 0 else {"general.architecture": "llama"}
        split = {"split.no": number, "split.count": parts, "split.tensors.count": len(names)}
        _write_one(part, metadata | split, made, names[number * size : (number + 1) * size])
    return paths[0]


def _write_one(path: Path, metadata: dict[str, Any], made: Content, names: list[str]) -> None:
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        _add(writer, key, value)
    for name in names:
        kind = made.kinds.get(name)
        raw = None if kind in (None, "F16") else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, made.tensors[name], raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    kind = gguf.GGUFValueType
    if key in ("split.no", "split.count") and isinstance(value, int):
        writer.add_uint16(key, value)
        return
    if key == "split.tensors.count":
        writer.add_int32(key, value)
        return
    if isinstance(value, list):
        inner = {bool: kind.BOOL, int: kind.INT32, float: kind.FLOAT32, str: kind.STRING}[type(value[0])]
        writer.add_key_value(key, value, kind.ARRAY, sub_type=inner)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_key_value(key, value, kind.UINT32 if value >= 0 else kind.INT32)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
