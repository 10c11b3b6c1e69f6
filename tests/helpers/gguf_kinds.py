"""The kinds of GGUF files that users bring: family, rotation, windows, biases, caps, head sizes, heads, types.

Each is written of a small model of transformers; what is read back must be that model, or be refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.gguf_models import tiny
from tests.helpers.gguf_writer import Content, content, dequantize, quantize, write

TEXT = 40
"""Tokens of the text that models are compared on; longer than the windows."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        family: `model_type` of the model that it is written of.
        settings: of that model's configuration.
        change: what is done to the file's content before it is written.
        refused: part of the message, where the file must be refused.
        arch: architecture in the file, where the family has two.
        parts: number of files.
        llamacpp: llama.cpp computes the same; else why not.
        tolerance: divergence from llama.cpp at any position.
    """

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Content], Content | None] | None = None
    refused: str | None = None
    arch: str | None = None
    parts: int = 1
    llamacpp: bool | str = True
    tolerance: float = 2e-5

    def model(self) -> Any:
        """The model that the file is written of."""
        return tiny(self.family, **self.settings)

    def content(self, model: Any) -> Content:
        """What the file holds."""
        made = content(model, arch=self.arch)
        return made if self.change is None else self.change(made) or made

    def write(self, model: Any, folder: Path) -> Path:
        """Write it; returns the first part."""
        return write(self.content(model), folder / "model.gguf", parts=self.parts)


def put(**values: Any) -> Callable[[Content], None]:
    """Add keys; two underscores stand for a dot, and keys without one belong to the architecture."""

    def change(made: Content) -> None:
        arch = made.metadata["general.architecture"]
        for name, value in values.items():
            key = name.replace("__", ".")
            made.metadata[
                key if key.startswith(("general.", "tokenizer.", "other.")) else f"{arch}.{key}"
            ] = value

    return change


def drop(*names: str) -> Callable[[Content], None]:
    def change(made: Content) -> None:
        for name in names:
            made.metadata.pop(name, None)
            made.tensors.pop(name, None)

    return change


def with_tensor(name: str, *shape: int, value: float = 0.5) -> Callable[[Content], None]:
    def change(made: Content) -> None:
        made.tensors[name] = np.full(shape, value, np.float32)

    return change


def all_of(*changes: Callable[[Content], Content | None]) -> Callable[[Content], Content]:
    def change(made: Content) -> Content:
        for each in changes:
            made = each(made) or made
        return made

    return change


def _drop_tensors(ending: str) -> Callable[[Content], None]:
    def change(made: Content) -> None:
        for name in [each for each in made.tensors if each.endswith(ending)]:
            assert not made.tensors[name].any()  # zeros, which is what an absent one stands for
            del made.tensors[name]

    return change


def _twin_head(made: Content) -> None:
    made.tensors["output.weight"] = made.tensors["token_embd.weight"]


def _as(kind: str) -> Callable[[Content], Content]:
    return lambda made: quantize(made, kind)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    """`rope_parameters` of a configuration."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
_LONG = {
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.5, 8.25],
    "attention_factor": 1.1902380714238083,
}
_LONG_SCALED = {
    **rope("longrope", original_max_position_embeddings=256, **_LONG),
    "max_position_embeddings": 512,  # llama.cpp's shortest context is 256, and it chooses by the context
}
_BEYOND = rope("longrope", original_max_position_embeddings=16, **_LONG)
_GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
}
_NO_LLAMACPP_BIAS = "llama.cpp has no place for this bias"
_GEMMA_27B = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

KINDS: dict[str, Kind] = {
    # Llama
    "llama": Kind("llama"),
    "llama, tied": Kind("llama", {"tie_word_embeddings": True}),
    "llama, head of its own that is the embedding again": Kind(
        "llama", {"tie_word_embeddings": True}, _twin_head
    ),
    "llama, as many keys as queries": Kind("llama", {"num_key_value_heads": 4}),
    "llama, one head of keys": Kind("llama", {"num_key_value_heads": 1}),
    "llama, wide heads": Kind("llama", {"head_dim": 16}),
    "llama, base 500,000": Kind("llama", rope("default", rope_theta=500000.0)),
    "llama, epsilon 0.01": Kind("llama", {"rms_norm_eps": 0.01}),
    "llama, linear": Kind("llama", rope("linear", factor=4.0)),
    "llama, yarn": Kind("llama", YARN),
    "llama, yarn by 40": Kind("llama", rope("yarn", factor=40.0, original_max_position_embeddings=4096)),
    "llama 3.1": Kind("llama", rope("llama3", factor=8.0, **LLAMA3, rope_theta=500000.0)),
    "llama 3.2, tied": Kind(
        "llama",
        {"tie_word_embeddings": True, **rope("llama3", factor=32.0, **LLAMA3, rope_theta=500000.0)},
    ),
    "llama 3 of another length": Kind(
        "llama", rope("llama3", factor=4.0, **{**LLAMA3, "original_max_position_embeddings": 64})
    ),
    "llama, factors of its own": Kind(
        "llama",
        rope(
            "longrope",
            short_factor=[1.0, 1.5, 7.0, 0.25],
            long_factor=[1.0, 1.5, 7.0, 0.25],
            attention_factor=1.0,
            original_max_position_embeddings=256,
        ),
        lambda made: _own_factors(made),
    ),
    "llama, longrope": Kind("llama", _LONG_SCALED),
    "llama, longrope beyond its length": Kind("llama", _BEYOND),
    "llama, all biases": Kind("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, biases of attention": Kind("llama", {"attention_bias": True}),
    "llama, biases of the MLP": Kind("llama", {"mlp_bias": True}),
    "llama, split in three": Kind("llama", parts=3),
    "mistral, full attention": Kind("mistral"),
    "mistral3": Kind("mistral", arch="mistral3"),
    # Qwen
    "qwen2": Kind("qwen2"),
    "qwen2, tied": Kind("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": Kind("qwen2", YARN),
    "qwen2, linear": Kind("qwen2", rope("linear", factor=2.0)),
    "qwen3": Kind("qwen3"),
    "qwen3, tied": Kind("qwen3", {"tie_word_embeddings": True}),
    "qwen3, yarn": Kind("qwen3", YARN),
    "qwen3, biases": Kind("qwen3", {"attention_bias": True}, llamacpp=_NO_LLAMACPP_BIAS),
    # Phi-3
    "phi3": Kind("phi3"),
    "phi3, tied": Kind("phi3", {"tie_word_embeddings": True}),
    "phi3, half of a head rotates": Kind("phi3", rope("default", partial_rotary_factor=0.5)),
    "phi3, longrope": Kind("phi3", _LONG_SCALED),
    "phi3, longrope beyond its length": Kind("phi3", _BEYOND),
    "phi3, longrope of half a head": Kind(
        "phi3",
        rope(
            "longrope",
            original_max_position_embeddings=128,
            partial_rotary_factor=0.5,
            short_factor=[1.0, 1.5],
            long_factor=[1.0, 3.0],
            attention_factor=1.19,
        ),
    ),
    "phi3, window": Kind("phi3", {"sliding_window": 6}, llamacpp="llama.cpp leaves the window of Phi-3 out"),
    # Gemma
    "gemma2": Kind("gemma2"),
    "gemma2, other caps": Kind("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2, wide window": Kind("gemma2", {"sliding_window": 4096}),
    "gemma2, linear": Kind("gemma2", rope("linear", factor=2.0)),
    "gemma2 27B": Kind(
        "gemma2", {**_GEMMA_27B, "num_hidden_layers": 46, "query_pre_attn_scalar": 8}, tolerance=1e-3
    ),
    "gemma3": Kind("gemma3_text"),
    "gemma3, twelve layers": Kind("gemma3_text", {"num_hidden_layers": 12}),
    "gemma3, linear": Kind("gemma3_text", {**_GEMMA3_ROPE, "num_hidden_layers": 7}),
    "gemma3, cap of logits": Kind("gemma3_text", {"final_logit_softcapping": 4.0}),
    "gemma3, no window": Kind(
        "gemma3_text", {"layer_types": ["full_attention"] * 3}, drop("gemma3.attention.sliding_window")
    ),
    "gemma3, own head": Kind("gemma3_text", {"tie_word_embeddings": False}),
    "gemma3 27B": Kind(
        "gemma3_text", {**_GEMMA_27B, "num_hidden_layers": 62, "query_pre_attn_scalar": 8}, tolerance=1e-3
    ),
    # GPT-2
    "gpt2": Kind("gpt2"),
    "gpt2, own head": Kind("gpt2", {"tie_word_embeddings": False}),
    "gpt2, narrow MLP": Kind("gpt2", {"n_inner": 48}),
    "gpt2, head written twice": Kind("gpt2", {}, _twin_head),
    # what must be refused
    "llama, experts": Kind("llama", change=put(expert_count=8), refused="mixtures of experts"),
    "llama, half of a head rotates": Kind(
        "llama", change=put(rope__dimension_count=4), refused="rotate as a whole"
    ),
    "llama, window": Kind("llama", change=put(attention__sliding_window=6), refused="two readings"),
    "llama, values of another size": Kind(
        "llama",
        change=put(attention__key_length=8, attention__value_length=16),
        refused="values of 16 channels",
    ),
    "llama, scale of attention": Kind("llama", change=put(attention__scale=0.5), refused="is 0.5; this"),
    "llama, scale of logits": Kind("llama", change=put(logit_scale=0.5), refused="have no such factor"),
    "llama, scale of embeddings": Kind(
        "llama", change=put(embedding_scale=12.0), refused="have no such factor"
    ),
    "llama, unknown kind of scaling": Kind(
        "llama", change=put(rope__scaling__type="spiral"), refused="'spiral' is not known"
    ),
    "llama, linear over factors": Kind(
        "llama",
        rope("llama3", factor=8.0, **LLAMA3),
        put(rope__scaling__factor=2.0),
        refused="on top of rope_freqs.weight",
    ),
    "llama, yarn with a ramp of its own": Kind(
        "llama", YARN, put(rope__scaling__yarn_beta_fast=16.0), refused="llama.cpp counts with 32.0"
    ),
    "llama, yarn with an attention factor of its own": Kind(
        "llama", YARN, put(rope__scaling__yarn_attn_factor=1.0), refused="llama.cpp counts with 1.13863"
    ),
    "llama, unknown setting": Kind("llama", change=put(layer_twist=1), refused="llama.layer_twist"),
    "llama, unknown setting of another kind": Kind(
        "llama", change=put(other__thing="x"), refused="other.thing: is not known"
    ),
    "llama, unknown tensor": Kind(
        "llama", change=with_tensor("blk.0.attn_gate.weight", 4, 4), refused="has no place for this tensor"
    ),
    "llama, bias of the head": Kind("llama", change=with_tensor("output.bias", 272), refused="output.bias"),
    "llama, norms of queries": Kind(
        "llama", change=with_tensor("blk.0.attn_q_norm.weight", 8), refused="attn_q_norm"
    ),
    "llama, both ways": Kind("llama", change=put(attention__causal=False), refused="sees later tokens"),
    "llama, tokenizer of an unknown kind": Kind(
        "llama", change=put(tokenizer__ggml__model="plamo2"), refused="'plamo2' is not supported"
    ),
    "llama, split of an unknown kind": Kind(
        "llama",
        change=put(tokenizer__ggml__model="gpt2", tokenizer__ggml__pre="abacus"),
        refused="'abacus' is not supported",
    ),
    "mistral3, attention that cools": Kind(
        "mistral",
        change=put(attention__temperature_scale=0.1),
        arch="mistral3",
        refused="needs a rope.scaling.type of yarn",
    ),
    "qwen2, no biases": Kind(
        "qwen2", change=lambda made: _no_biases(made), refused="blk.0.attn_q.bias: this tensor is missing"
    ),
    "qwen3, factors": Kind(
        "qwen3", change=with_tensor("rope_freqs.weight", 8, value=2.0), refused="rope_freqs.weight"
    ),
    "phi3, only long factors": Kind(
        "phi3", change=with_tensor("rope_factors_long.weight", 4), refused="it holds rope_factors_long.weight"
    ),
    "gemma3, yarn": Kind(
        "gemma3_text",
        change=put(rope__scaling__type="yarn", rope__scaling__factor=2.0),
        refused="only a linear scaling",
    ),
    "gemma3, cap of attention": Kind(
        "gemma3_text", change=put(attn_logit_softcapping=50.0), refused="gemma3.attn_logit_softcapping"
    ),
    "an architecture that nobody asked for": Kind(
        "llama", change=put(general__architecture="mamba"), refused="'mamba' is not supported"
    ),
    "an adapter": Kind("llama", change=put(general__type="adapter"), refused="'adapter' is not a model"),
}

_SMALL_BLOCKS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
_LARGE_BLOCKS = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
)
QUANTIZED: dict[str, Kind] = {
    **{kind: Kind("llama", {"intermediate_size": 64}, _as(kind)) for kind in _SMALL_BLOCKS},
    **{
        kind: Kind("llama", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}, _as(kind))
        for kind in _LARGE_BLOCKS
    },
}
"""{quantization type: a file with all matrices in it}; `decoded` gives the same in float32."""


def decoded(kind: Kind, model: Any) -> Content:
    """The content of a quantized file in float32."""
    return dequantize(kind.content(model))


def _own_factors(made: Content) -> Content:
    """One tensor of factors for all lengths, as Llama 3 has it."""
    factors = made.tensors.pop("rope_factors_short.weight")
    made.tensors.pop("rope_factors_long.weight")
    made.tensors["rope_freqs.weight"] = factors
    for key in [each for each in made.metadata if ".rope.scaling." in each]:
        del made.metadata[key]
    return made


def _no_biases(made: Content) -> None:
    for name in [each for each in made.tensors if each.endswith(".bias")]:
        del made.tensors[name]
