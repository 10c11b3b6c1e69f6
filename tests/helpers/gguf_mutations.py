"""One change at a time to the content of a GGUF file: each key and each tensor in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.helpers.gguf_writer import Content

# Keys that a damaged or unusual file may have beside its own; without the architecture's name.
_MORE_KEYS: dict[str, list[Any]] = {
    "rope.scaling.type": ["none", "linear", "yarn", "longrope", "spiral"],
    "rope.scaling.factor": [2.0, 0.0, -1.0],
    "rope.scale_linear": [2.0],
    "rope.scaling.attn_factor": [0.75],
    "rope.scaling.original_context_length": [64],
    "rope.scaling.yarn_ext_factor": [0.5],
    "rope.scaling.yarn_attn_factor": [0.5],
    "rope.scaling.yarn_beta_fast": [8.0],
    "rope.scaling.yarn_beta_slow": [4.0],
    "rope.scaling.yarn_log_multiplier": [0.5],
    "rope.scaling.finetuned": [True],
    "rope.freq_base": [500.0],
    "rope.freq_base_swa": [500.0],
    "rope.dimension_count": [4, 6],
    "rope.dimension_count_swa": [4],
    "attention.sliding_window": [3, 4096],
    "attention.sliding_window_pattern": [1, 2],
    "attention.scale": [0.5],
    "attention.key_length": [4],
    "attention.value_length": [4],
    "attention.clamp_kqv": [1.0],
    "attention.max_alibi_bias": [8.0],
    "attention.causal": [False],
    "attention.head_count_kv": [1],
    "attention.layer_norm_epsilon": [0.5],
    "attention.layer_norm_rms_epsilon": [0.5],
    "attn_logit_softcapping": [1.5],
    "final_logit_softcapping": [1.5],
    "logit_scale": [0.5],
    "embedding_scale": [2.0],
    "residual_scale": [0.5],
    "expert_count": [2],
    "expert_used_count": [1],
    "use_parallel_residual": [True],
    "vocab_size": [271],
    "pooling_type": [1],
    "invented": [1],
}
_MORE_TENSORS = {
    "rope_freqs.weight": (4,),
    "rope_factors_long.weight": (4,),
    "rope_factors_short.weight": (4,),
    "output.bias": (272,),
    "output_norm.bias": (32,),
    "token_embd_norm.weight": (32,),
    "position_embd.weight": (256, 32),
    "blk.0.attn_q.bias": (32,),
    "blk.0.attn_output.bias": (32,),
    "blk.0.ffn_up.bias": (48,),
    "blk.0.attn_q_norm.weight": (8,),
    "blk.0.attn_sinks.weight": (4,),
    "blk.0.attn_norm.bias": (32,),
    "blk.0.ffn_gate_inp.weight": (2, 32),
    "blk.9.attn_norm.weight": (32,),
    "cls.output.weight": (2, 32),
}


def changed_values(value: Any) -> list[Any]:
    """Other values of the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 0]
    if isinstance(value, float):
        return [value * 2, math.nan]
    if isinstance(value, str):
        return [f"{value}x"]
    return [value[:-1], [*value[1:], value[0]]]


def key_mutations(made: Content) -> Iterator[tuple[str, str, Any, Content]]:
    """Each key changed, left out, or added: what was done, key, new value (None where left out), content."""
    arch = made.metadata["general.architecture"]
    for key, value in made.metadata.items():
        for other in changed_values(value):
            yield f"{key} = {_short(other)}", key, other, _with(made, key, other)
        left = made.copy()
        del left.metadata[key]
        yield f"without {key}", key, None, left
    for name, values in _MORE_KEYS.items():
        key = f"{arch}.{name}"
        for other in values:
            if made.metadata.get(key) != other:
                yield f"{key} = {other}", key, other, _with(made, key, other)
    yield "other.invented = 1", "other.invented", 1, _with(made, "other.invented", 1)


def tensor_mutations(made: Content) -> Iterator[tuple[str, str, Content]]:
    """Each tensor left out, and others added: what was done, name, content."""
    for name in made.tensors:
        left = made.copy()
        del left.tensors[name]
        yield f"without {name}", name, left
    for name, shape in _MORE_TENSORS.items():
        if name not in made.tensors:
            more = made.copy()
            generator = np.random.default_rng(0)
            more.tensors[name] = generator.uniform(1, 2, shape).astype(np.float32)
            yield f"with {name}", name, more
    if "output.weight" not in made.tensors:
        more = made.copy()
        embedding = made.tensors["token_embd.weight"]
        more.tensors["output.weight"] = np.ascontiguousarray(embedding[::-1])
        yield "with output.weight", "output.weight", more


def _with(made: Content, key: str, value: Any) -> Content:
    changed = made.copy()
    changed.metadata[key] = value
    return changed


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)
