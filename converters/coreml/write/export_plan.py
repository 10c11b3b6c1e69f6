"""What an export will make, known before the long work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from converters.coreml.format import INTERFACES, Interface
from converters.coreml.write.deployment_target import parse_target
from converters.coreml.write.neural_engine import Chunk, LayerRange
from converters.coreml.write.size import predict_size
from converters.coreml.write.standins import decoder_of_stand_ins, embedding_model_of_stand_ins
from converters.coreml.write.stateful import Stateful
from converters.coreml.write.targets import check_target
from converters.coreml.write.vocabulary import RowSplit, plan_split, split_palettes, split_vocabulary
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import decoder_config
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.embedding.export_interface import chosen_interface
from edkm_export.decoder.embedding.fixed_length import FixedLength
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.states import KeysValues, layers_with
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.errors import ConversionError
from edkm_export.kv_cache import FLOAT, INT8, check_kv_cache

__all__ = [
    "DEFAULT_PREFILL",
    "LARGEST_CHUNK_BYTES",
    "ExportPlan",
    "chunk_decoder",
    "plan_export",
    "vocabulary_split",
]

DEFAULT_PREFILL = 64
LARGEST_CHUNK_BYTES = 1_000_000_000
"""Weights of one program above which `--chunks auto` cuts; the Neural Engine takes about 1 to 2 GB."""

_DEFAULT_CONTEXT = {"swift-transformers": 2048, "neural-engine": 2048, "logits": 512, "embedding": 512}
_CONTEXT_MULTIPLE = 32  # of a state's size on the Neural Engine


_FLOAT_STATES = (
    "Core ML holds states as float16 and as nothing else (coremltools 9.0 refuses other types for iOS 18), and codes "
    "in a float16 state would save nothing. Use --sequence-length for a smaller cache, or edkm-export onnx or coreai "
    "with --kv-cache int8."
)
_NO_CACHE = "--interface {} keeps no keys and values; leave it out."
_WHY_FLOAT = {
    "swift-transformers": f"swift-transformers prescribes float16 keyCache and valueCache, and {_FLOAT_STATES}",
    "neural-engine": _FLOAT_STATES,
    **{interface: _NO_CACHE.format(interface) for interface in ("logits", "embedding")},
}


@dataclass(frozen=True)
class ExportPlan:
    """What an export will make.

    Attributes:
        interface: how an app calls it.
        target: deployment target.
        context: positions that it can hold.
        prefill: tokens of one prefill call of the neural-engine interface, 0 for the others.
        chunks: layers of each package; one range for a single package.
        split: how the vocabulary is cut, None: it is not.
        package_sizes_bytes: predicted size of each package's weight.bin.
        hidden_size: channels of a token's vector.
    """

    interface: Interface
    target: str
    context: int
    prefill: int
    chunks: tuple[LayerRange, ...]
    split: RowSplit | None
    package_sizes_bytes: tuple[int, ...]
    hidden_size: int

    @property
    def weights_size_bytes(self) -> int:
        """Predicted size of all weights."""
        return sum(self.package_sizes_bytes)

    def package_names(self, name: str) -> tuple[str, ...]:
        """File names of the packages, in the order in which they run."""
        count = len(self.chunks)
        if count == 1:
            return (f"{name}.mlpackage",)
        return tuple(f"{name}-{index}-of-{count}.mlpackage" for index in range(1, count + 1))


def plan_export(
    checkpoint: Checkpoint,
    *,
    interface: str | None = None,
    target: str = "iOS18",
    sequence_length: int | None = None,
    prefill: int = DEFAULT_PREFILL,
    chunks: int | Literal["auto"] = "auto",
    kv_cache: str = FLOAT,
) -> ExportPlan:
    """Check that a checkpoint can be exported, and predict the sizes.

    Args:
        checkpoint: what to export.
        interface: one of `INTERFACES`; None: "swift-transformers", or "embedding" of an embedding model.
        target: one of `deployment_target.TARGETS`, in any usual spelling.
        sequence_length: positions that the package can hold; None: 512 without a cache, otherwise 2,048, or what the
            model can.
        prefill: tokens of one prefill call, for neural-engine.
        chunks: packages to cut the layers into, for neural-engine; "auto": as few as stay below
            `LARGEST_CHUNK_BYTES` each.
        kv_cache: "float"; "int8" is refused, since states of Core ML are float16.

    Raises:
        ConversionError: unsupported family, target or option, or a length beyond the model's.
        CheckpointError: its parameters are not those of its model.
    """
    source, target = str(checkpoint.path or "checkpoint"), parse_target(target)
    chosen = _interface(chosen_interface(checkpoint, interface, INTERFACES, INTERFACES[0]), target, source)
    if check_kv_cache(kv_cache) == INT8:
        raise ConversionError(f"{source}: --kv-cache int8: {_WHY_FLOAT[chosen]}")
    if chosen != "neural-engine" and chunks not in ("auto", 1):
        raise ConversionError(f"{source}: --chunks {chunks} is for --interface neural-engine.")
    check_target(checkpoint.palettized, target, source)
    if checkpoint.embedding is not None:
        return _plan_embedding(checkpoint, checkpoint.embedding, target, sequence_length, source)
    config = decoder_config(checkpoint.config, source)
    if chosen != "logits" and not layers_with(config, KeysValues):
        raise ConversionError(
            f"{source}: no layer of it attends, and --interface {chosen} asks for keys and values; use "
            "--interface logits."
        )
    context = _context(chosen, config.max_positions, sequence_length, prefill, source)
    PositionTables(config, checkpoint.config, context)  # refuses positions that constant tables cannot hold
    split = vocabulary_split(checkpoint) if chosen == "neural-engine" else None
    whole = LayerRange(0, config.num_layers, config.num_layers)
    if chosen != "neural-engine":
        kind = Stateful if chosen == "swift-transformers" else WholeSequence
        module = kind(decoder_of_stand_ins(checkpoint), checkpoint.config, context)
        # whole texts need the numbers of their positions only to look learned ones up
        unused = ("positions",) if config.names.positions is None else ()
        size = predict_size(module, checkpoint.palettized, unused=unused)
        return ExportPlan(chosen, target, context, 0, (whole,), None, (size,), config.hidden_size)
    for ranges in _divisions(config, chunks, source):
        sizes = tuple(
            _chunk_size(checkpoint, layers, split, context=context, prefill=prefill) for layers in ranges
        )
        if chunks != "auto" or max(sizes) <= LARGEST_CHUNK_BYTES:
            break
    return ExportPlan(chosen, target, context, prefill, ranges, split, sizes, config.hidden_size)


def _plan_embedding(
    checkpoint: Checkpoint, settings: EmbeddingSettings, target: str, asked: int | None, source: str
) -> ExportPlan:
    """One function over texts of a fixed length."""
    model = embedding_model_of_stand_ins(checkpoint)
    limit = model.config.max_positions
    usual = min(_DEFAULT_CONTEXT["embedding"], settings.max_tokens)
    context = _context("embedding", limit, usual if asked is None else asked, 0, source)
    module = FixedLength(model, checkpoint.config, context)
    # a mean needs no numbers of the positions, and tables of rotations are looked up before
    counted = settings.pooling != "mean" or model.config.names.positions is not None
    size = predict_size(module, checkpoint.palettized, unused=() if counted else ("positions",))
    whole = LayerRange(0, model.config.num_layers, model.config.num_layers)
    return ExportPlan("embedding", target, context, 0, (whole,), None, (size,), model.config.hidden_size)


def _interface(name: str, target: str, source: str) -> Interface:
    for known in INTERFACES:
        if name == known:
            if target in ("iOS16", "iOS17") and known not in ("logits", "embedding"):
                raise ConversionError(
                    f"{source}: --interface {known} keeps its cache in a state, which {target} does not have. "
                    "Use --target iOS18, or --interface logits."
                )
            return known
    raise ConversionError(f"--interface {name!r} is unknown; use one of {', '.join(INTERFACES)}.")


def _context(interface: Interface, limit: int, asked: int | None, prefill: int, source: str) -> int:
    length = min(_DEFAULT_CONTEXT[interface], limit) if asked is None else asked
    # swift-transformers takes a range of two lengths for a fixed one
    least = 3 if interface == "swift-transformers" else 2
    if interface != "neural-engine":
        if not least <= length <= limit:
            raise ConversionError(
                f"{source}: --sequence-length {length} is outside {least} to {limit}, the model's positions."
            )
        return length
    if prefill < 2:
        raise ConversionError(f"--prefill {prefill} is too short; use 2 or more tokens.")
    if asked is None:
        length = length // _CONTEXT_MULTIPLE * _CONTEXT_MULTIPLE
    if length % _CONTEXT_MULTIPLE or not _CONTEXT_MULTIPLE <= length <= limit:
        largest = limit // _CONTEXT_MULTIPLE * _CONTEXT_MULTIPLE
        if not largest:
            raise ConversionError(
                f"{source}: the model has {limit} positions, fewer than the {_CONTEXT_MULTIPLE} that a state on the "
                "Neural Engine takes; use --interface swift-transformers."
            )
        raise ConversionError(
            f"{source}: --sequence-length {length} cannot be held on the Neural Engine; use a multiple of "
            f"{_CONTEXT_MULTIPLE} up to {largest}."
        )
    if prefill > length:
        raise ConversionError(
            f"--prefill {prefill} is longer than the context of {length} positions; use {length} or less."
        )
    return length


def _divisions(config: DecoderConfig, chunks: int | str, source: str) -> Iterator[tuple[LayerRange, ...]]:
    """Ranges of nearly equal length; one division, or all from coarse to fine."""
    layers = config.num_layers
    if config.sharing_layers or config.layer_embedding is not None:
        if chunks not in ("auto", 1):
            raise ConversionError(
                f"{source}: --chunks {chunks} cuts a model whose layers read keys and values of other layers, or a "
                "per-layer embedding of the tokens, and a package hands over neither; use --chunks 1."
            )
        chunks = 1
    if chunks != "auto" and not (isinstance(chunks, int) and 1 <= chunks <= layers):
        raise ConversionError(f"{source}: --chunks {chunks} is outside 1 to {layers}, the model's layers.")
    for count in range(1, layers + 1) if chunks == "auto" else [int(chunks)]:
        bounds = [round(index * layers / count) for index in range(count + 1)]
        yield tuple(LayerRange(first, end, layers) for first, end in itertools.pairwise(bounds))


def vocabulary_split(checkpoint: Checkpoint) -> RowSplit | None:
    """How the output head of a checkpoint is cut for the Neural Engine; None when it need not or cannot be."""
    name = checkpoint.tied.get("lm_head.weight", "lm_head.weight")
    palette = checkpoint.palettized.get(name)
    rows = checkpoint.dense[name].shape[0] if palette is None else palette.shape[0]
    return plan_split(name, rows, palette)


def chunk_decoder(checkpoint: Checkpoint, layers: LayerRange, split: RowSplit | None) -> Decoder:
    """A decoder of stand-ins that holds nothing but what a chunk uses."""
    decoder = decoder_of_stand_ins(checkpoint)
    names, stack = decoder.config.names, decoder.stack
    if split is not None and (layers.gives_logits or (layers.embeds and decoder.config.tied)):
        split_vocabulary(decoder, split)
    for index in range(layers.total):
        if not layers.first <= index < layers.end:
            stack.get_submodule(names.layers).add_module(str(index), nn.Identity())
    if not layers.gives_logits:
        stack.add_module(names.final_norm, nn.Identity())
        decoder.add_module("lm_head", nn.Identity())
    if not layers.embeds:
        # A tied embedding stays: the head's weight goes by its name.
        if not (decoder.config.tied and layers.gives_logits):
            stack.add_module(names.embedding, nn.Identity())
        if names.positions is not None:
            stack.add_module(names.positions, nn.Identity())
    return decoder


def _chunk_size(
    checkpoint: Checkpoint, layers: LayerRange, split: RowSplit | None, *, context: int, prefill: int
) -> int:
    decoder = chunk_decoder(checkpoint, layers, split)
    tables = PositionTables(decoder.config, checkpoint.config, context, slice(layers.first, layers.end))
    chunk = Chunk(decoder, tables, layers, prefill)
    # learned positions are looked up by the first chunk alone, and only rotation and sliding windows need them later
    learned = decoder.config.names.positions is not None and layers.embeds
    positioned = bool(tables.tables) or learned or chunk.window is not None
    unused = () if positioned else ("offsets",)
    return predict_size(chunk, split_palettes(checkpoint.palettized, split), unused=unused, merged=True)
