"""A small random Llama whose weights have every form of palette that the Core AI format can hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from edkm_export import checkpoint
from edkm_export.checkpoint import Checkpoint
from edkm_export.palette import PalettizedTensor
from tests.helpers.odd_models import build, build_tokenizer
from tests.helpers.palettes import random_palette

__all__ = ["DENSE", "FORMS", "mixed_checkpoint", "saved_checkpoint"]

# Parameter, bits, groups along both axes, dim, int8.
FORMS: dict[str, tuple[int, tuple[int, int], int, bool]] = {
    "model.embed_tokens.weight": (4, (20, 1), 1, False),
    "model.layers.0.self_attn.q_proj.weight": (1, (1, 1), 1, False),
    "model.layers.0.self_attn.k_proj.weight": (2, (4, 1), 1, False),
    "model.layers.0.self_attn.v_proj.weight": (3, (2, 1), 1, False),
    "model.layers.0.self_attn.o_proj.weight": (4, (4, 2), 1, False),
    "model.layers.0.mlp.gate_proj.weight": (6, (3, 1), 1, False),
    "model.layers.0.mlp.up_proj.weight": (8, (1, 1), 1, False),
    "model.layers.0.mlp.down_proj.weight": (3, (4, 1), 1, True),
    "model.layers.1.self_attn.q_proj.weight": (4, (4, 1), 2, False),
    "model.layers.1.self_attn.k_proj.weight": (4, (1, 1), 1, True),
    "model.layers.1.self_attn.v_proj.weight": (3, (2, 1), 4, False),
    "model.layers.1.mlp.gate_proj.weight": (2, (6, 1), 1, True),
    "model.layers.1.mlp.up_proj.weight": (8, (2, 1), 1, True),
    "model.layers.1.mlp.down_proj.weight": (6, (2, 2), 2, False),
}
DENSE = "model.layers.1.self_attn.o_proj.weight"
"""A matrix that is left dense."""

_UNIFORM = (
    "model.layers.0.self_attn.v_proj.weight"  # one LUT entry everywhere: Apple's package stores it once
)
_STRANGE = "model.layers.0.mlp.up_proj.weight"  # minus zero, subnormals and extremes, which no index selects


def mixed_checkpoint() -> Checkpoint:
    """The checkpoint, made anew; the same numbers each time."""
    torch.manual_seed(0)
    model = build("plain").half()
    state = dict(model.state_dict())
    palettized = {name: _palette(name, tuple(state[name].shape), place) for place, name in enumerate(FORMS)}
    dense = {
        name: tensor.clone()
        for name, tensor in state.items()
        if name not in palettized and name != "lm_head.weight"
    }
    tokenizer = build_tokenizer(model.config.vocab_size)
    return Checkpoint(
        config={**model.config.to_dict(), "max_position_embeddings": 256},  # the static engine needs as many
        palettized=palettized,
        dense=dense,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        tokenizer={"tokenizer.json": tokenizer.backend_tokenizer.to_str().encode()},
        recipe={"name": "mixed"},
        provenance={"seed": 0},
    )


def saved_checkpoint(path: Path) -> Checkpoint:
    """Write it and read it back."""
    checkpoint.save(mixed_checkpoint(), path)
    return checkpoint.load(path)


def _palette(name: str, shape: tuple[int, ...], seed: int) -> PalettizedTensor:
    n_bits, groups, dim, int8 = FORMS[name]
    made = random_palette(shape, n_bits, groups, dim, int8=int8, name=name, seed=seed)
    if int8:
        return made
    lut, indices = made.lut * 0.125, made.unpack_indices()
    if name == _UNIFORM:
        indices = torch.full_like(indices, 5)
    if name == _STRANGE:
        lut[0, 0, :4, 0] = torch.tensor([-0.0, 6e-8, -65504.0, 65504.0]).half()
        indices = indices.clamp(min=4)
    return replace(PalettizedTensor.from_indices(name, lut, indices, shape=shape), name=name)
