"""What an export will make: checked, traced and measured before any weight is touched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from converters.onnx.backend import load_onnx
from converters.onnx.format import (
    ATTENTION_MASK,
    DATA_FILE,
    FORMAT,
    INPUT_IDS,
    INTERFACES,
    LOGITS,
    METADATA_PREFIX,
    POSITION_IDS,
    StateName,
    past_name,
    present_name,
)
from converters.onnx.write.builder import CONTRIB, GraphBuilder, Weight
from converters.onnx.write.cached_decoder import build_graph
from converters.onnx.write.embedding_graph import build_embedding_graph, embedding_interface
from converters.onnx.write.fused_attention import ATTENTION_OPSET
from converters.onnx.write.growing_cache import BATCH, NEW, TOTAL, graph_states, state_dtype
from converters.onnx.write.profiles import FORMS_OF_PROFILE, StandardFastForms
from edkm_export._version import __version__
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import empty_decoder
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.embedding.embedding_model import EmbeddingModel, empty_embedding_model
from edkm_export.decoder.embedding.export_interface import chosen_interface
from edkm_export.decoder.states import KeysValues, cache_bytes_per_token, layers_with
from edkm_export.errors import ConversionError
from edkm_export.kv_cache import FLOAT, INT8, KVCache, check_kv_cache

__all__ = ["OnnxPlan", "plan_onnx"]

_OPSETS = (18, 23)
_BLOCKWISE_OPSET = 21  # DequantizeLinear with blocks
_ALIGNMENT = 64
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class OnnxPlan:
    """A graph whose weights are still to be written.

    Attributes:
        interface: "decoder" or "embedding".
        runtime: profile.
        dtype: of activations, cache and logits.
        opset: version of the standard operators.
        context: positions that the tables hold.
        kv_cache: how keys and values are held.
        config: of the decoder.
        model: ModelProto; its weights name their place in the data file.
        weights: in the order of the data file, with their offsets.
        weights_size_bytes: size of the data file.
    """

    interface: str
    runtime: str
    dtype: str
    opset: int
    context: int
    kv_cache: KVCache
    config: DecoderConfig
    model: Any
    weights: tuple[tuple[int, Weight], ...]
    weights_size_bytes: int

    @property
    def size_bytes(self) -> int:
        """Size of both files."""
        return self.weights_size_bytes + int(self.model.ByteSize())

    @property
    def cache_bytes_per_token(self) -> int:
        """What keys and values of a token take while the graph runs."""
        return cache_bytes_per_token(self.config, self.kv_cache, _DTYPES[self.dtype].itemsize)


def plan_onnx(
    checkpoint: Checkpoint,
    *,
    interface: str | None = None,
    runtime: str = "exact",
    dtype: str = "float32",
    opset: int | None = None,
    context: int | None = None,
    standard_ops: bool = False,
    kv_cache: str = FLOAT,
) -> OnnxPlan:
    """Check that a checkpoint can be exported, and make its graph.

    Args:
        checkpoint: what to export.
        interface: "decoder" or "embedding"; None: the one that the checkpoint is for.
        runtime: "exact", "low-memory" or "fast".
        dtype: of activations, cache and logits, "float32" or "float16".
        opset: version of the standard operators; None: the oldest that the profile needs, and for `fast` and
            `low-memory` the one that has attention as an operator, if it can be used.
        context: positions that the tables hold; None: all of the model, of an embedding model as many as texts are
            cut to.
        standard_ops: the fast profile without onnxruntime's own operators.
        kv_cache: "float" or "int8", how keys and values are held.

    Raises:
        ConversionError: unsupported family, profile or option, or palettes that the profile cannot hold.
        CheckpointError: parameters that do not fit the model.
        BackendMissingError: onnx is not installed.
    """
    source = str(checkpoint.path or "checkpoint")
    _check_options(runtime, dtype, standard_ops)
    oldest = _BLOCKWISE_OPSET if standard_ops else _OPSETS[0]
    chosen = chosen_interface(checkpoint, interface, INTERFACES, INTERFACES[0])
    traced = empty_embedding_model(checkpoint) if chosen == "embedding" else empty_decoder(checkpoint)
    config = traced.config
    attends = runtime != "exact" and not standard_ops and dtype == "float32" and config.attention_cap is None
    held = _kv_cache(kv_cache, chosen, config, source)
    attends = attends and chosen == "decoder" and held == FLOAT  # the operator of such a cache
    if opset is None:
        opset = ATTENTION_OPSET if attends else oldest
    if not oldest <= opset <= _OPSETS[1]:
        raise ConversionError(
            f"--opset {opset} is outside {oldest} to {_OPSETS[1]}, which this profile needs; leave it out."
        )
    usual = config.max_positions if checkpoint.embedding is None else checkpoint.embedding.max_tokens
    length = usual if context is None else context
    if not 2 <= length <= config.max_positions:
        raise ConversionError(
            f"{source}: --context-length {length} is outside 2 to {config.max_positions}, the model's positions."
        )
    load_onnx()
    graph = GraphBuilder(opset)
    forms = (StandardFastForms if standard_ops else FORMS_OF_PROFILE[runtime])(
        graph, checkpoint, _DTYPES[dtype]
    )
    with torch.no_grad():
        if isinstance(traced, EmbeddingModel):
            build_embedding_graph(traced, checkpoint.config, length, forms, graph, _DTYPES[dtype])
            inputs, outputs = embedding_interface(traced, dtype)
        else:
            build_graph(traced, checkpoint.config, length, forms, graph, _DTYPES[dtype], held)
            inputs, outputs = _decoder_interface(config, dtype, held)
    placed, offset = [], 0
    for weight in graph.weights.values():
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        placed.append((offset, weight))
        offset += weight.size_bytes
    metadata = _metadata(checkpoint, config, chosen, runtime, length, held)
    model = _model(graph, placed, inputs, outputs, metadata)
    return OnnxPlan(chosen, runtime, dtype, opset, length, held, config, model, tuple(placed), offset)


def _check_options(runtime: str, dtype: str, standard_ops: bool) -> None:
    if runtime not in FORMS_OF_PROFILE:
        raise ConversionError(f"--runtime {runtime!r} is unknown; use one of {', '.join(FORMS_OF_PROFILE)}.")
    if dtype not in _DTYPES:
        raise ConversionError(f"--dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}.")
    if standard_ops and runtime != "fast":
        raise ConversionError(
            f"--standard-ops is for --runtime fast; {runtime} has standard operators anyway."
        )


def _kv_cache(asked: str, interface: str, config: DecoderConfig, source: str) -> KVCache:
    """The option, where the graph has keys and values."""
    held = check_kv_cache(asked)
    if held == INT8 and (interface != "decoder" or not layers_with(config, KeysValues)):
        what = (
            "an embedding model, which keeps nothing of a text"
            if interface != "decoder"
            else "no layer that attends"
        )
        raise ConversionError(
            f"{source}: --kv-cache int8 is for keys and values, and it has {what}; leave it out."
        )
    return held


def _metadata(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    interface: str,
    runtime: str,
    context: int,
    kv_cache: KVCache,
) -> dict[str, str]:
    palettized = {
        name: {"shape": list(tensor.shape), "n_bits": tensor.n_bits}
        for name, tensor in checkpoint.palettized.items()
    }
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "runtime": runtime,
        "context_length": str(context),
        "palettized": palettized,
        "dense": {name: list(tensor.shape) for name, tensor in checkpoint.dense.items()},
        "tied": dict(checkpoint.tied),
        "interface": interface,
    }
    if kv_cache != FLOAT:
        values["kv_cache"] = kv_cache
    if checkpoint.embedding is not None:
        values["embedding"] = checkpoint.embedding.model_dump(mode="json")
        # positions are counted from the first column, padding or not
        values["padding"] = "either" if config.relative_positions else "right"
    return {
        METADATA_PREFIX + key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in values.items()
    }


def _decoder_interface(config: DecoderConfig, dtype: str, kv_cache: KVCache) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of a decoder with cache, as `ValueInfoProto`."""
    helper, types = load_onnx().helper, load_onnx().TensorProto
    real = types.FLOAT16 if dtype == "float16" else types.FLOAT
    states = graph_states(config, kv_cache)
    kinds = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16, torch.int8: types.INT8}

    def describe(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    def kind(what: StateName) -> int:
        return int(kinds[state_dtype(what, kv_cache, _DTYPES[dtype])])

    inputs = [
        describe(INPUT_IDS, types.INT64, BATCH, NEW),
        describe(ATTENTION_MASK, types.INT64, BATCH, TOTAL),
        describe(POSITION_IDS, types.INT64, BATCH, NEW),
        *(describe(past_name(layer, what), kind(what), *past) for layer, what, past, _ in states),
    ]
    outputs = [
        describe(LOGITS, real, BATCH, NEW, config.vocab_size),
        *(describe(present_name(layer, what), kind(what), *now) for layer, what, _, now in states),
    ]
    return inputs, outputs


def _model(
    graph: GraphBuilder,
    placed: list[tuple[int, Weight]],
    inputs: list[Any],
    outputs: list[Any],
    metadata: dict[str, str],
) -> Any:
    helper = load_onnx().helper
    tensors = [*graph.inline, *(_external(weight, offset) for offset, weight in placed)]
    opsets = [helper.make_opsetid("", graph.opset)]
    if graph.contrib:
        opsets.append(helper.make_opsetid(CONTRIB, 1))
    made = helper.make_graph(graph.nodes, "decoder", inputs, outputs, initializer=tensors)
    model = helper.make_model(
        made,
        opset_imports=opsets,
        producer_name="edkm-export",
        producer_version=__version__,
        ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
    )
    helper.set_model_props(model, metadata)
    return model


def _external(weight: Weight, offset: int) -> Any:
    onnx = load_onnx()
    tensor = onnx.TensorProto(
        name=weight.name,
        dims=weight.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(weight.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    places = {"location": DATA_FILE, "offset": offset, "length": weight.size_bytes}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
