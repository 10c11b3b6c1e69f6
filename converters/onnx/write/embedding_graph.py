"""The graph of an embedding model: texts of any length in any batch."""

from __future__ import annotations

from typing import Any

import torch

from converters.onnx.backend import load_onnx
from converters.onnx.format import ATTENTION_MASK, EMBEDDING, INPUT_IDS, POSITION_IDS, TOKEN_TYPES, VECTORS
from converters.onnx.write.builder import GraphBuilder
from converters.onnx.write.fused_norms import replace_norm
from converters.onnx.write.growing_cache import BATCH, NEW
from converters.onnx.write.tracing import Tracer, Value, WeightForms
from edkm_export.decoder.embedding.embedding_model import EmbeddingModel, visible_masks
from edkm_export.decoder.positions import PositionTables

__all__ = ["build_embedding_graph", "embedding_interface"]


def build_embedding_graph(
    model: EmbeddingModel, hf_config: dict[str, Any], context: int, weights: WeightForms, graph: GraphBuilder,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Trace an embedding model.

    Args:
        model: on the meta device.
        hf_config: Hugging Face configuration, for the position tables.
        context: positions that the tables hold.
        weights: the forms of parameters, which write to `graph`.
        graph: receives the nodes.
        dtype: of activations, float32 or float16.

    Raises:
        ConversionError: constant tables cannot hold the positions, or the model has an unknown function.
    """
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    tracer = Tracer(graph, weights, parameters, dtype)
    for module in model.modules():  # they are ours alone
        replace_norm(module, tracer)
    inputs: dict[str, Any] = {
        name: Value(tracer, name, (BATCH, NEW), torch.int64)
        for name in (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPES)
    }
    places = graph.node("Squeeze", graph.node("Shape", INPUT_IDS, start=1, end=2), graph.integers(0))
    zero, one = tracer.constant(0, torch.int64), tracer.constant(1, torch.int64)
    # by this name the reader knows them
    counted = graph.node("Range", zero, places, one)
    graph.append("Unsqueeze", (counted, graph.integers(0)), (graph.unique(POSITION_IDS),))
    positions: Any = Value(tracer, POSITION_IDS, (1, NEW), torch.int64)
    rotary = PositionTables(model.config, hf_config, context)(positions)
    types = inputs[TOKEN_TYPES] if model.config.token_types else None
    visible = visible_masks(model.config, positions)
    vectors, embeddings = model(inputs[INPUT_IDS], inputs[ATTENTION_MASK], types, positions, rotary, visible)
    outputs = {VECTORS: vectors.name, EMBEDDING: embeddings.name}
    graph.rename({value: name for name, value in outputs.items()})
    graph.prune(list(outputs))


def embedding_interface(model: EmbeddingModel, dtype: str) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of the graph, as `ValueInfoProto`."""
    helper, types = load_onnx().helper, load_onnx().TensorProto
    real = types.FLOAT16 if dtype == "float16" else types.FLOAT
    names = [INPUT_IDS, ATTENTION_MASK, *([TOKEN_TYPES] if model.config.token_types else [])]
    inputs = [helper.make_tensor_value_info(name, types.INT64, [BATCH, NEW]) for name in names]
    sizes = {VECTORS: [BATCH, NEW, model.config.hidden_size], EMBEDDING: [BATCH, model.dimension]}
    outputs = [helper.make_tensor_value_info(name, real, size) for name, size in sizes.items()]
    return inputs, outputs
