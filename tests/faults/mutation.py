"""Faults to plant in artifacts: what the verifier must find, and what it must not mind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.rope import rope_tables

__all__ = ["Mutation", "rope_tables_of"]

# Parameters of a Llama.
Q, K, V, OUT = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
Q1 = "model.layers.1.self_attn.q_proj.weight"
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
NORM, FINAL_NORM = "model.layers.1.input_layernorm.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Mutation:
    """A change of an artifact on disk.

    Attributes:
        kind: bytes, ops, attributes, names, shapes, states or order.
        name: what is changed, in words.
        apply: makes the change to a copy; takes its path and the checkpoint.
        harmful: it changes the computed function, or what the artifact says of itself; False: the verifier must
            not mind.
        module: what localization must name, where that is claimed.
    """

    kind: str
    name: str
    apply: Callable[[Path, Checkpoint], None]
    harmful: bool = True
    module: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def rope_tables_of(checkpoint: Checkpoint, length: int, **changes: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a checkpoint, float32 [length, head_dim], with some parameters of RoPE changed."""
    config = copy.deepcopy(checkpoint.config)
    config["rope_parameters"].update(changes)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return rope_tables(config, head_dim, length)
