"""What an export will make: checked and measured before any weight is touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converters.coreai.backend import load_converter
from converters.coreai.format import (
    EXTEND,
    INTERFACES,
    LOAD_EMBEDDINGS,
    MAIN,
    PROMPT,
    QUERY_LENGTHS,
    SHORTEST_CONTEXT,
    Interface,
    context_ladder,
    gather_name,
    step_name,
)
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import empty_decoder
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.states import Columns, KeysValues, cache_bytes_per_token, layers_with
from edkm_export.errors import ConversionError
from edkm_export.kv_cache import FLOAT, INT8, KVCache, check_kv_cache
from edkm_export.packing import packed_size_bytes
from edkm_export.palette import PalettizedTensor

__all__ = ["CoreAIPlan", "plan_coreai"]

_STATIC_CONTEXT = 1024  # unless told otherwise: longer caches are reported to go wrong on iOS, see `lint`


@dataclass(frozen=True)
class CoreAIPlan:
    """An export that can be made.

    Attributes:
        interface: "dynamic" or "neural-engine".
        context: positions that the tables hold.
        pad_3bit: 3-bit indices are held in 4 bits.
        kv_cache: how keys and values are held.
        config: of the decoder.
        weights_size_bytes: of all constants: palettes, other weights, position tables.
    """

    interface: Interface
    context: int
    pad_3bit: bool
    kv_cache: KVCache
    config: DecoderConfig
    weights_size_bytes: int

    @property
    def cache_bytes_per_token(self) -> int:
        """What keys and values of a token take in the states."""
        return cache_bytes_per_token(self.config, self.kv_cache, 2, even=True)

    @property
    def function_names(self) -> tuple[str, ...]:
        """Functions of the program."""
        if self.interface == "dynamic":
            return (MAIN,)
        steps = [
            step_name(function, length, tokens)
            for function in (EXTEND, PROMPT)
            for length in context_ladder(self.context)
            for tokens in QUERY_LENGTHS
        ]
        return (LOAD_EMBEDDINGS, *map(gather_name, QUERY_LENGTHS), *steps)


def plan_coreai(
    checkpoint: Checkpoint,
    *,
    interface: str = "dynamic",
    context: int | None = None,
    pad_3bit: bool = False,
    kv_cache: str = FLOAT,
) -> CoreAIPlan:
    """Check that a checkpoint can be exported.

    Args:
        checkpoint: what to export.
        interface: "dynamic" or "neural-engine".
        context: positions that the tables hold; None: all of the model, and for "neural-engine" 1,024.
        pad_3bit: hold 3-bit indices in 4 bits.
        kv_cache: "float" or, with "dynamic", "int8": how keys and values are held.

    Raises:
        ConversionError: unsupported family or option.
        CheckpointError: parameters that do not fit the model.
        BackendMissingError: Core AI is not installed.
    """
    source = str(checkpoint.path or "checkpoint")
    if checkpoint.embedding is not None:
        raise ConversionError(
            f"{checkpoint.path or 'checkpoint'}: holds an embedding model, which is not exported to Core AI; use "
            "coreml or onnx."
        )
    if interface not in INTERFACES:
        raise ConversionError(f"--interface {interface!r} is unknown; use one of {', '.join(INTERFACES)}.")
    held = check_kv_cache(kv_cache)
    if held == INT8 and interface == "neural-engine":
        raise ConversionError(
            f"{source}: --kv-cache int8 cannot be had with --interface neural-engine: Apple's StaticShapeEngine "
            "prescribes float16 key_cache and value_cache, and has no states for scales. Use --interface dynamic, or a "
            "shorter --context-length for less memory."
        )
    load_converter()
    config = empty_decoder(checkpoint).config
    _check_states(config, interface, source)
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
        kv_cache=held,
        config=config,
        weights_size_bytes=size,
    )


def _check_states(config: DecoderConfig, interface: str, source: str) -> None:
    """Refuse layers whose states an engine cannot hold."""
    if interface == "neural-engine" and layers_with(config, Columns):
        raise ConversionError(
            f"{source}: --interface neural-engine feeds some tokens again, which the state of a convolution or a "
            "recurrence cannot take back; use --interface dynamic."
        )
    if interface == "neural-engine" and config.layer_embedding is not None:
        raise ConversionError(
            f"{source}: --interface neural-engine hands over embedded tokens, and the per-layer embedding of this "
            "model is looked up by their numbers; use --interface dynamic."
        )
    if interface == "neural-engine" and (config.sharing_layers or config.full_heads is not None):
        raise ConversionError(
            f"{source}: --interface neural-engine has one size of keys and values, and one place for each layer; this "
            "model has heads of two sizes, or layers that share keys and values. Use --interface dynamic."
        )
    if not layers_with(config, KeysValues):
        raise ConversionError(f"{source}: no layer of it attends, and the engine asks for keys and values.")


def _static_context(source: str, config: DecoderConfig, asked: int | None) -> int:
    """A length that the static engine's caches can have.

    The engine takes the largest dimension of `key_cache` for its length, so that no other may be larger.
    """
    width = config.num_kv_heads * config.head_dim
    known = [
        length for length in context_ladder(config.max_positions) if length >= max(width, config.num_layers)
    ]
    if not known:
        raise ConversionError(
            f"{source}: the static engine needs a cache of {max(width, SHORTEST_CONTEXT)} positions or more, and the "
            f"model has {config.max_positions}; use --interface dynamic."
        )
    if asked is None:
        return max((length for length in known if length <= _STATIC_CONTEXT), default=known[0])
    if asked not in known:
        raise ConversionError(
            f"{source}: --context-length {asked} is no length that the static engine's caches can have; use one of "
            f"{', '.join(map(str, known))}."
        )
    return asked


def _stored_size(tensor: PalettizedTensor, pad_3bit: bool) -> int:
    if not (pad_3bit and tensor.n_bits == 3):
        return tensor.size_bytes
    rows, columns = tensor.index_shape
    indices = packed_size_bytes(rows * columns, 4) - tensor.indices.numel()
    return tensor.size_bytes + indices + tensor.lut.numel() * tensor.lut.element_size()


def _dense_size(tensor: Tensor) -> int:
    """As float16; a constant of equal numbers is stored once."""
    half = tensor.half().reshape(-1)
    return 2 if bool((half == half[0]).all()) else half.numel() * torch.finfo(torch.float16).bits // 8
