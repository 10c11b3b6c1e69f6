"""Small random models of every family, in odd shapes, for comparison with transformers' own.

They are made from what each family declares, so that a new one needs no line here. `build("gemma3: odd")` gives a
model. Norm weights and biases are random too: with the usual ones and zeros, a
decoder that forgot them would pass.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic.fields import FieldInfo

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.families import FAMILIES
from edkm_export.decoder.families.settings import Activation
from edkm_export.reference.stored_buffers import stored_buffers
from tests.helpers.odd_models import build_tokenizer

__all__ = [
    "CASES",
    "EXPORTED",
    "SAMPLED",
    "build",
    "build_case",
    "checkpoint_of",
    "keys_of",
    "plain",
    "trainable",
]

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "shared_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}
_ODD_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 20,
    "shared_intermediate_size": 20,
    "num_key_value_heads": 1,
    "head_dim": 14,
    "n_embd": 27,
    "n_head": 3,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MIXED = ["sliding_attention", "full_attention"]


def keys_of(kind: str) -> dict[str, FieldInfo]:
    """What a family takes from a configuration: {key: field}."""
    return {field.alias or name: field for name, field in FAMILIES[kind].model_fields.items()}


def plain(kind: str) -> dict[str, Any]:
    """A small configuration of a family, with the first example of each of its fields."""
    keys = keys_of(kind)
    sizes = {key: size for key, size in _SIZES.items() if key in keys and keys[key].examples != []}
    return {**_TOKENS, **sizes, **{key: field.examples[0] for key, field in keys.items() if field.examples}}


def odd(kind: str) -> dict[str, Any]:
    """Odd sizes, one key/value head, every switch turned, and the last example of each field."""
    keys = keys_of(kind)
    given = plain(kind)
    given |= {key: size for key, size in _ODD_SIZES.items() if key in given}
    for key, field in keys.items():
        if field.examples:
            given[key] = field.examples[-1]
        elif field.annotation is bool:
            given[key] = not field.default
        elif field.annotation == Activation:
            given[key] = "gelu"
    return given


def _name(kind: str) -> str:
    """Of a plain case."""
    return kind.removesuffix("_text")


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{_name(kind): (kind, plain(kind)) for kind in FAMILIES},
    **{f"{_name(kind)}: odd": (kind, odd(kind)) for kind in FAMILIES},
    "qwen2: windows": ("qwen2", {**plain("qwen2"), "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3: windows and biases": (
        "qwen3",
        {**plain("qwen3"), "attention_bias": True, "use_sliding_window": True, "layer_types": _MIXED},
    ),
    "gemma2: low caps": (
        "gemma2",
        {
            **plain("gemma2"),
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "sliding_window": 1,
        },
    ),
    "gemma3: scaled RoPE": (
        "gemma3_text",
        {
            **plain("gemma3_text"),
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma4: dense": (
        "gemma4_text",
        {
            **plain("gemma4_text"),
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1000.0,
                    "partial_rotary_factor": 0.3,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3: longrope": (
        "phi3",
        {
            **plain("phi3"),
            "head_dim": 8,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 48,
            "max_position_embeddings": 192,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.5, 2.0, 4.0],
                "partial_rotary_factor": 0.75,
            },
        },
    ),
}
"""{case: (model type, arguments of its configuration)}: two of each family, and special ones."""

EXPORTED = tuple(_name(kind) for kind in FAMILIES if kind != "llama")
"""The plain case of each family, whose sizes are also good for palettes of 16 rows; `odd_models` has Llamas."""

_QUICK = ("gemma3", "gpt2", "phi3")
SAMPLED = [case if case in _QUICK else pytest.param(case, marks=pytest.mark.slow) for case in EXPORTED]
"""The same for tests that take seconds: a few that differ most in the default run, the others where it may be slow."""


def build(case: str, seed: int = 0) -> Any:
    """A random model of a case of `CASES`: float32, in eval mode, the same for the same seed."""
    return build_case(*CASES[case], seed=seed)


def trainable(case: str, folder: Path) -> Any:
    """A plain case with a tokenizer in a folder, as `train` takes it: the model."""
    kind, arguments = CASES[case]
    sizes = {key: 304 for key in ("vocab_size", "vocab_size_per_layer_input") if key in arguments}
    model = build_case(kind, {**arguments, **sizes})
    model.save_pretrained(folder)
    build_tokenizer(304).save_pretrained(folder)
    return model


def build_case(kind: str, given: dict[str, Any], seed: int = 0) -> Any:
    """A random model of a model type and the arguments of its configuration."""
    arguments = copy.deepcopy(given)  # a config completes its RoPE parameters in place
    deviation = 1 / math.sqrt(given.get("hidden_size", given.get("n_embd")))  # unit gain of each layer
    config = transformers.AutoConfig.for_model(kind, **arguments, initializer_range=deviation)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        offset = kind in ("gemma2", "gemma3_text")  # their norms multiply by one plus their weight
        centre = 0.0 if offset else 1.0
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.3, 0.9)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif name.endswith("A_log"):
                parameter.uniform_(-5, 1)  # heads that remember two tokens, and others that remember hundreds
            elif parameter.dim() == 1:
                parameter.uniform_(centre - 0.5, centre + 0.5)
                if kind in ("gemma3n_text", "gemma4_text") and name.endswith("k_norm.weight"):
                    # as trained ones: scores have no other scale
                    parameter.mul_(len(parameter) ** -0.5)
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
    dense |= {name: buffer.detach().clone() for name, buffer in stored_buffers(model).items()}
    return Checkpoint(config=model.config.to_dict(), palettized={}, dense=dense, tied=tied)
