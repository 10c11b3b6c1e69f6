"""A checkpoint becomes an .aimodel: trace, convert, describe, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from converters.coreai.backend import load_authoring, quiet
from converters.coreai.format import DESCRIPTION_KEY, FORMAT, dense_digest, palette_digest
from converters.coreai.write.conversion import convert
from converters.coreai.write.dynamic_engine import dynamic_function
from converters.coreai.write.export_plan import CoreAIPlan
from converters.coreai.write.static_engine import static_functions
from converters.coreai.write.weight_ops import named_weights, stored_form
from edkm_export._version import __version__
from edkm_export.activity import activity
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import empty_decoder
from edkm_export.decoder.decoder import Decoder
from edkm_export.errors import ConversionError
from edkm_export.kv_cache import FLOAT

__all__ = ["describe", "named_decoder", "write_asset"]


@torch.no_grad()
def named_decoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float16) -> Decoder:
    """The decoder of a checkpoint with its palettized weights as names; the others are its own.

    Raises:
        ConversionError, CheckpointError: see `empty_decoder`.
    """
    decoder = empty_decoder(checkpoint)
    named_weights(decoder, checkpoint.palettized, checkpoint.tied, torch.zeros(1, dtype=dtype))
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.dense.items()}
    state |= {name: state[target] for name, target in checkpoint.tied.items() if target in state}
    own = dict(decoder.named_parameters())
    decoder.load_state_dict({name: state[name] for name in own}, assign=True, strict=False)
    if "lm_head.weight" in own:
        decoder.tie()
    return decoder.to(dtype).eval().requires_grad_(False)


def write_asset(checkpoint: Checkpoint, plan: CoreAIPlan, path: Path) -> None:
    """Write an .aimodel, which must not exist.

    Args:
        checkpoint: what to export.
        plan: from `plan_coreai`.
        path: of the asset, ending in .aimodel.

    Raises:
        ConversionError: coreai-torch cannot convert the model.
        OSError: the disk is full or not writable.
    """
    source = str(checkpoint.path or "checkpoint")
    decoder = named_decoder(checkpoint)
    if plan.interface == "neural-engine":
        functions = static_functions(decoder, checkpoint.config, plan.context, torch.float16)
    else:
        functions = [dynamic_function(decoder, checkpoint.config, plan.context, torch.float16, plan.kv_cache)]
    program = convert(functions, checkpoint.palettized, pad_3bit=plan.pad_3bit, source=source)
    metadata = load_authoring().Metadata()
    metadata.set_custom(DESCRIPTION_KEY, describe(checkpoint, plan))
    try:
        # One native call: 2 s for SmolLM2, 30 s with the functions of the static engine.
        with activity(f"writing {path.name}", holds_interpreter=True), quiet():
            program.save_asset(path, metadata)
    except RuntimeError as error:
        if isinstance(error.__cause__, OSError):
            raise OSError(f"{path}: writing failed, is the disk full? ({error.__cause__})") from error
        raise ConversionError(f"{source}: Core AI cannot write this model: {error}") from error


def describe(checkpoint: Checkpoint, plan: CoreAIPlan) -> dict[str, Any]:
    """Our entry in the metadata of the asset; `read.description` reads it."""
    palettized = {}
    for name, tensor in checkpoint.palettized.items():
        stored = stored_form(tensor, pad_3bit=plan.pad_3bit)
        digest = palette_digest(
            stored.n_bits,
            stored.index_shape,
            stored.indices.numpy().tobytes(),
            stored.lut.numpy(),
            None if stored.lut_scale is None else stored.lut_scale.numpy(),
        )
        palettized[name] = {"dense_shape": list(tensor.shape), "n_bits": tensor.n_bits, "digest": digest}
    return {
        "format": FORMAT,
        "version": __version__,
        "interface": plan.interface,
        "context": plan.context,
        "vocab_size": plan.config.vocab_size,
        "palettized": palettized,
        "dense": {
            name: {
                "shape": list(tensor.shape),
                "digest": dense_digest(tensor.half().contiguous().numpy().tobytes()),
            }
            for name, tensor in checkpoint.dense.items()
        },
        "tied": dict(checkpoint.tied),
        **({} if plan.kv_cache == FLOAT else {"kv_cache": plan.kv_cache}),
    }
