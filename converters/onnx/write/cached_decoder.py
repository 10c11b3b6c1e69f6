"""The graph of a decoder with the states of its layers."""

from __future__ import annotations

from typing import Any

import torch

from converters.onnx.format import ATTENTION_MASK, INPUT_IDS, KEY, LOGITS, POSITION_IDS
from converters.onnx.write.builder import GraphBuilder
from converters.onnx.write.delta_scan import replace_rule
from converters.onnx.write.fused_attention import ATTENTION_OPSET, replace_attention
from converters.onnx.write.fused_norms import replace_norm
from converters.onnx.write.fused_rotary import replace_rotation
from converters.onnx.write.growing_cache import BATCH, NEW, TOTAL, GrowingCache
from converters.onnx.write.tracing import END, Tracer, Value, WeightForms
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.context import MASKED, Context, causal_mask, sliding_mask
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.states import Columns, KeysValues, layers_with
from edkm_export.kv_cache import FLOAT, KVCache

__all__ = ["build_graph"]


def build_graph(
    decoder: Decoder, hf_config: dict[str, Any], context: int, weights: WeightForms, graph: GraphBuilder,
    dtype: torch.dtype, kv_cache: KVCache = FLOAT,
) -> None:  # fmt: skip
    """Trace a decoder.

    Args:
        decoder: on the meta device.
        hf_config: Hugging Face configuration, for the position tables.
        context: positions that the tables hold.
        weights: the forms of parameters, which write to `graph`.
        graph: receives the nodes; its inputs and outputs have the names that docs/onnx.md lists.
        dtype: of activations, float32 or float16.
        kv_cache: how keys and values are held.

    Raises:
        ConversionError: constant tables cannot hold the positions, or the decoder has an unknown function.
    """
    config = decoder.config
    parameters = {id(parameter): name for name, parameter in decoder.named_parameters()}
    tracer = Tracer(graph, weights, parameters, dtype)
    tables = PositionTables(config, hf_config, context)
    # The operator appends keys and values as they are to those that it reads.
    attends = graph.opset >= ATTENTION_OPSET and dtype == torch.float32 and kv_cache == FLOAT
    for module in decoder.modules():  # they are ours alone
        replace_norm(module, tracer)
        replace_rule(module, tracer)
        rotation = replace_rotation(module, tracer, tables) if weights.contrib or attends else None
        if attends:
            replace_attention(module, tracer, rotation)
    input_ids = Value(tracer, INPUT_IDS, (BATCH, NEW), torch.int64)
    position_ids = Value(tracer, POSITION_IDS, (BATCH, NEW), torch.int64)
    cache = GrowingCache(tracer, config, kv_cache)
    attending = layers_with(config, KeysValues)
    masks = _masks(tracer, decoder, cache.past(KEY, attending[0])) if attending else {}
    real = _real(tracer, input_ids) if layers_with(config, Columns) else None
    place: Any = Context(position_ids, tables(position_ids), masks, real)  # type: ignore[arg-type]
    logits = decoder(input_ids, place, cache)
    outputs = {LOGITS: logits.name, **cache.present}
    graph.rename({value: name for name, value in outputs.items()})
    graph.prune(list(outputs))


def _masks(tracer: Tracer, decoder: Decoder, past: Value) -> dict[str, Value]:
    """Additive masks [batch, 1, new, total] of each kind of layer: causal, and without padding."""
    graph = tracer.graph

    def size(name: str, axis: int) -> str:
        length = graph.node("Shape", name, start=axis, end=axis + 1)
        return graph.node("Squeeze", length, graph.integers(0))  # type: ignore[no-any-return]

    total = size(ATTENTION_MASK, 1)
    zero, one = tracer.constant(0, torch.int64), tracer.constant(1, torch.int64)
    # Places in the cache, not position_ids: these repeat in padding.
    keys = Value(tracer, graph.node("Range", zero, total, one), (TOTAL,), torch.int64)
    queries = Value(tracer, graph.node("Range", size(past.name, 2), total, one), (NEW,), torch.int64)
    keys, queries = keys.unsqueeze(0), queries.unsqueeze(0)
    causal: Any = causal_mask(queries, keys)  # type: ignore[arg-type]
    given = Value(tracer, ATTENTION_MASK, (BATCH, TOTAL), torch.int64)
    padding = (1 - given)[:, None, None, :].float() * MASKED
    masks = {FULL: causal.minimum(padding)}
    window = decoder.config.sliding_window
    if window is not None:
        masks[SLIDING] = sliding_mask(masks[FULL], queries, keys, window)  # type: ignore[arg-type]
    return {kind: masks[kind] for kind in decoder.config.attention_kinds()}


def _real(tracer: Tracer, input_ids: Value) -> Value:
    """One for each new token, zero for padding, [batch, new, 1]: the end of the attention mask."""
    graph = tracer.graph
    new = graph.node("Shape", input_ids.name, start=1, end=2)
    ends = graph.integers(END)
    last = graph.node("Slice", ATTENTION_MASK, graph.node("Neg", new), ends, graph.integers(1))
    return Value(tracer, last, (BATCH, NEW), torch.int64).float().unsqueeze(-1)
