"""A palettized checkpoint becomes a Core ML package with whole-sequence logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from converters.coreml.backend import load_coremltools
from converters.coreml.convert import convert, save_package
from converters.coreml.targets import check_target
from edkm_export._version import __version__
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.models.decoder import WholeSequence
from edkm_export.models.registry import build_decoder, decoder_config
from edkm_export.models.rope import rope_tables

__all__ = ["DEFAULT_SEQUENCE_LENGTH", "LogitsPlan", "export_logits", "plan_logits"]

DEFAULT_SEQUENCE_LENGTH = 512
_ALIGNMENT = 64  # of a blob in weight.bin, and size of the record in front of it


@dataclass(frozen=True)
class LogitsPlan:
    """What an export will make.

    Attributes:
        sequence_length: tokens of the one input, `input_ids` int32 [1, sequence_length].
        target: deployment target.
        weights_size_bytes: predicted size of weight.bin.
    """

    sequence_length: int
    target: str
    weights_size_bytes: int


def plan_logits(
    checkpoint: Checkpoint, *, target: str = "iOS18", sequence_length: int | None = None
) -> LogitsPlan:
    """Check that a checkpoint can be exported, and predict the size, before the long work.

    Raises:
        ConversionError: unsupported family or target, or a sequence length beyond the model's.
    """
    source = str(checkpoint.path or "checkpoint")
    config = decoder_config(checkpoint.config, source)
    limit = config.max_positions
    length = min(DEFAULT_SEQUENCE_LENGTH, limit) if sequence_length is None else sequence_length
    if not 2 <= length <= limit:
        raise ConversionError(
            f"{source}: --sequence-length {length} is outside 2 to {limit}, the model's positions."
        )
    check_target(checkpoint.palettized, target, source)
    rope_tables(
        checkpoint.config, config.head_dim, length
    )  # refuses a scaling that constant tables cannot hold
    return LogitsPlan(length, target, _weights_size_bytes(checkpoint, length, config.head_dim))


def _weights_size_bytes(checkpoint: Checkpoint, length: int, head_dim: int) -> int:
    """Every blob behind its record, both aligned; blobs below ten elements stay in the program."""
    blobs = []
    for tensor in checkpoint.palettized.values():
        blobs.append((tensor.index_shape[0] * tensor.index_shape[1], tensor.indices.numel()))
        blobs.append((tensor.lut.numel(), tensor.lut.numel() * tensor.lut.element_size()))
        if tensor.lut_scale is not None:
            blobs.append((tensor.lut_scale.numel(), tensor.lut_scale.numel() * 2))
    blobs += [(tensor.numel(), tensor.numel() * 2) for tensor in checkpoint.dense.values()]
    weights: dict[str, tuple[int, ...]] = {
        name: tensor.shape for name, tensor in checkpoint.palettized.items()
    }
    weights |= {name: tuple(tensor.shape) for name, tensor in checkpoint.dense.items()}
    outputs = {
        shape[0]
        for name, shape in weights.items()
        if len(shape) > 1 and f"{name.removesuffix('weight')}bias" not in weights
    }
    blobs += [
        (size, size * 2) for size in outputs
    ]  # zeros, since a linear layer has a bias whether needed or not
    blobs += [(length * head_dim, length * head_dim * 2)] * 2 + [(length * length, length * length * 2)]
    aligned = (math.ceil(size / _ALIGNMENT) * _ALIGNMENT for count, size in blobs if count >= 10)
    return _ALIGNMENT + sum(size + _ALIGNMENT for size in aligned)


def export_logits(checkpoint: Checkpoint, plan: LogitsPlan, path: Path) -> None:
    """Write the package.

    One function, `input_ids` int32 [1, sequence_length] -> `logits` float16 [1, sequence_length, vocab_size].

    Args:
        checkpoint: what to export.
        plan: from `plan_logits`.
        path: the .mlpackage, which must not exist.

    Raises:
        ConversionError, CheckpointError, BackendMissingError: see `convert` and `build_decoder`.
    """
    ct = load_coremltools()
    module = WholeSequence(build_decoder(checkpoint), checkpoint.config, plan.sequence_length).eval()
    model = convert(
        module,
        (torch.zeros(1, plan.sequence_length, dtype=torch.int32),),
        checkpoint.palettized,
        inputs=[ct.TensorType("input_ids", (1, plan.sequence_length), dtype=np.int32)],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        target=plan.target,
        metadata={"com.github.edkm-export.version": __version__},
        prefix="decoder.",
        source=str(checkpoint.path or "checkpoint"),
    )
    del module
    save_package(model, path)
