"""What an export will make: checked and measured before any weight is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.coreai.backend import load_converter
from converters.coreai.format import INTERFACES, MAIN, Interface
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import empty_decoder
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.positions import PositionTables
from edkm_export.errors import ConversionError
from edkm_export.packing import packed_size_bytes
from edkm_export.palette import PalettizedTensor

__all__ = ["PREFILL_LENGTHS", "CoreAIPlan", "context_ladder", "plan_coreai"]

PREFILL_LENGTHS = (8, 16, 64)
"""Tokens of one call of the static engine, as apple/coreai-models exports them."""

_SHORTEST_CONTEXT = 256  # of the static engine's caches, which double from here


@dataclass(frozen=True)
class CoreAIPlan:
    """An export that can be made.

    Attributes:
        interface: "dynamic" or "neural-engine".
        context: positions that the tables hold.
        pad_3bit: 3-bit indices are held in 4 bits.
        config: of the decoder.
        weights_size_bytes: of all constants: palettes, other weights, position tables.
    """

    interface: Interface
    context: int
    pad_3bit: bool
    config: DecoderConfig
    weights_size_bytes: int

    @property
    def function_names(self) -> tuple[str, ...]:
        """Functions of the program."""
        return (MAIN,)


def plan_coreai(
    checkpoint: Checkpoint,
    *,
    interface: str = "dynamic",
    context: int | None = None,
    pad_3bit: bool = False,
) -> CoreAIPlan:
    """Check that a checkpoint can be exported.

    Args:
        checkpoint: what to export.
        interface: "dynamic" or "neural-engine".
        context: positions that the tables hold; None: all of the model, and for "neural-engine" at most 4,096.
        pad_3bit: hold 3-bit indices in 4 bits.

    Raises:
        ConversionError: unsupported family or option.
        CheckpointError: parameters that do not fit the model.
        BackendMissingError: Core AI is not installed.
    """
    source = str(checkpoint.path or "checkpoint")
    if interface not in INTERFACES:
        raise ConversionError(f"--interface {interface!r} is unknown; use one of {', '.join(INTERFACES)}.")
    load_converter()
    config = empty_decoder(checkpoint).config
    if pad_3bit and not any(tensor.n_bits == 3 for tensor in checkpoint.palettized.values()):
        raise ConversionError(
            f"{source}: --pad-3bit is for weights of 3 bits, and it has none; leave it out."
        )
    length = config.max_positions if context is None else context
    if interface == "neural-engine":
        length = _static_context(source, config, context)
    elif not 2 <= length <= config.max_positions:
        raise ConversionError(
            f"{source}: --context-length {length} is outside 2 to {config.max_positions}, the model's positions."
        )
    size = sum(_stored_size(tensor, pad_3bit) for tensor in checkpoint.palettized.values())
    size += sum(_dense_size(tensor) for tensor in checkpoint.dense.values())
    size += sum(tensor.numel() * 2 for tensor in PositionTables(config, checkpoint.config, length).buffers())
    return CoreAIPlan(
        interface="neural-engine" if interface == "neural-engine" else "dynamic",
        context=length,
        pad_3bit=pad_3bit,
        config=config,
        weights_size_bytes=size,
    )


def context_ladder(context: int) -> Iterator[int]:
    """Cache lengths of the static engine's functions."""
    length = _SHORTEST_CONTEXT
    while length <= context:
        yield length
        length *= 2


def _static_context(source: str, config: DecoderConfig, asked: int | None) -> int:
    most = config.max_positions
    length = min(most, 4096) if asked is None else asked
    ladder = list(context_ladder(min(most, length)))
    if asked is None and ladder:
        return ladder[-1]
    if length not in ladder:
        lengths = [str(each) for each in context_ladder(most)]
        known = (
            ", ".join(lengths)
            if lengths
            else "none: the model has too few positions; use --interface dynamic"
        )
        raise ConversionError(
            f"{source}: --context-length {length} cannot be held by the static engine, whose caches double from "
            f"{_SHORTEST_CONTEXT}; this model can have {known}."
        )
    return length


def _stored_size(tensor: PalettizedTensor, pad_3bit: bool) -> int:
    if not (pad_3bit and tensor.n_bits == 3):
        return tensor.size_bytes
    rows, columns = tensor.index_shape
    return (
        tensor.size_bytes
        + tensor.lut.numel() * 2
        + packed_size_bytes(rows * columns, 4)
        - tensor.indices.numel()
    )


def _dense_size(tensor: Tensor) -> int:
    """As float16; a constant of equal numbers is stored once."""
    half = tensor.half().reshape(-1)
    return 2 if bool((half == half[0]).all()) else half.numel() * torch.finfo(torch.float16).bits // 8
