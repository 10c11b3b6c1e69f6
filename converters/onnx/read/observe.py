"""What happens inside a graph: every value that depends on the input, out of onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from converters.onnx.backend import load_onnx, load_onnxruntime
from converters.onnx.format import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from converters.onnx.read.graph import Graph
from converters.onnx.read.interface import batch_feeds, past_of
from edkm_export.errors import PackageError

__all__ = ["trace_graph"]


def trace_graph(
    graph: Graph, tokens: Tensor, observe: Callable[[str, Tensor], None], cached: int = 0
) -> None:
    """Run a decoder unoptimized, with each of its values as one more output.

    The file on disk is not touched: outputs are added to a copy in memory. Values that do not depend on the input,
    such as decoded weights, and those that no output needs are left out.

    Args:
        graph: a decoder with cache.
        tokens: int64 [positions].
        observe: called as `observe(node, value)` in the order of the graph.
        cached: so many tokens are fed first and not observed.

    Raises:
        PackageError: onnxruntime refuses the graph, or fails in it.
    """
    onnx, ort = load_onnx(), load_onnxruntime()
    model = onnx.load_model(str(graph.path), load_external_data=False)
    needed = set(graph.outputs)
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    depends = set(graph.inputs)
    shown: dict[str, str] = {}
    for node in model.graph.node:
        if needed.intersection(node.output) and depends.intersection(node.input):
            depends.update(filter(None, node.output))
            shown.update((name, f"{node.op_type} {node.name!r}") for name in node.output if name)
    declared = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown if name not in declared)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.path.parent)
    )
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = batch_feeds(graph, [tokens], len(tokens))
        if cached:
            first = dict(feeds)
            for key in feeds.keys() & {INPUT_IDS, POSITION_IDS, ATTENTION_MASK}:
                first[key] = feeds[key][:, :cached]
            outputs = list(graph.outputs)
            past = past_of(dict(zip(outputs, session.run(outputs, first), strict=True)))
            feeds.update(past)
            for key in feeds.keys() & {INPUT_IDS, POSITION_IDS}:
                feeds[key] = feeds[key][:, cached:]
        values = session.run(list(shown), feeds)
    except Exception as error:  # the exceptions of onnxruntime have no common base
        raise PackageError(f"{graph.path}: cannot be traced in onnxruntime: {error}") from error
    for label, value in zip(shown.values(), values, strict=True):
        if value is not None and value.dtype.kind == "f":
            observe(label, torch.from_numpy(value).float())
