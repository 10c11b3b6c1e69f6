"""Small checkpoints with every kind of palette, exported to ONNX, for tests."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import torch

from edkm_export.checkpoint import Checkpoint
from edkm_export.palette import PalettizedTensor
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from tests.helpers.odd_families import build as build_family
from tests.helpers.odd_families import checkpoint_of
from tests.helpers.odd_models import build
from tests.helpers.palettes import random_palette

__all__ = ["export", "family_checkpoint", "palettized_checkpoint"]


_WIDE = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp")


@cache
def palettized_checkpoint(
    n_bits: int = 4,
    *,
    groups_in: int = 1,
    dim: int = 1,
    int8: bool = False,
    int4: bool = False,
    tied: bool = True,
    case: str = "plain",
) -> Checkpoint:
    """A random Llama whose matrices are all random palettes with a LUT for every 8 rows of indices.

    The embedding takes scalar LUTs, since vectors run along its vocabulary. With `int4`, which goes with `int8`, the
    entries of most matrices are in -8..7: queries, keys and values alike, gate and up of one layer not.
    """
    model = build("untied" if case == "plain" and not tied else case)
    tied = bool(model.config.tie_word_embeddings)
    palettized, dense = {}, {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() == 1:
            dense[name] = parameter.detach().half()
            continue
        rows, columns = parameter.shape
        vectors = 1 if "embed" in name or (tied and "lm_head" in name) else dim
        groups = (max(rows // vectors // 8, 1), groups_in if columns % groups_in == 0 else 1)
        made = random_palette((rows, columns), n_bits, groups, vectors, int8=int8, name=name, seed=seed)
        palettized[name] = _scaled(made, small=int4 and not name.startswith(_WIDE))
    tied_names = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    return Checkpoint(
        config=json.loads(model.config.to_json_string(use_diff=False)),
        palettized=palettized,
        dense=dense,
        tied=tied_names,
    )


def _scaled(palette: PalettizedTensor, small: bool) -> PalettizedTensor:
    """The same with values of about 0.1, exact in float16 and, with an int8 LUT, as products in float32 too."""
    lut, scale = palette.lut, palette.lut_scale
    if scale is None:
        lut = lut / 8
    else:  # powers of two: entry times scale needs no rounding
        if small:
            lut = lut.remainder(16) - 8
        scale = torch.full_like(scale, 2**-6 if small else 2**-9) * 2 ** torch.arange(
            scale.numel()
        ).remainder(3).view_as(scale)
    return PalettizedTensor(
        palette.name,
        palette.shape,
        palette.n_bits,
        lut,
        palette.indices,
        None if scale is None else scale.half(),
        "int4" if small and palette.n_bits <= 3 else palette.lut_dtype,
    )


def family_checkpoint(case: str) -> Checkpoint:
    """A random model of a family at 3 bits, its LUTs on an int8 grid."""
    model = build_family(case)
    config = model.config.to_dict()
    parts = palettize_model(model, uniform_recipe(3, 16, "int8"))
    made = dataclasses.replace(
        checkpoint_of(build_family(case)), palettized=parts.palettized, dense=parts.dense, tied=parts.tied
    )
    assert made.config == config
    return made


def export(checkpoint: Checkpoint, folder: Path, **options: object) -> Path:
    """What `edkm-export onnx --no-verify` leaves; path of the folder."""
    from converters.onnx.write.bundle import write_bundle
    from converters.onnx.write.export_plan import plan_onnx

    folder.mkdir(parents=True)
    write_bundle(checkpoint, plan_onnx(checkpoint, **options), folder)  # type: ignore[arg-type]
    return folder
