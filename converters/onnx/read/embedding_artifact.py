"""An exported embedding model: texts to vectors in onnxruntime, one by one and in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.onnx.format import ATTENTION_MASK, EMBEDDING, INPUT_IDS, TOKEN_TYPES, VECTORS
from converters.onnx.read.executors import Executor, ReferenceRuntime
from converters.onnx.read.graph import Graph
from converters.onnx.read.graph_files import GraphFiles
from converters.onnx.read.lut_graph import LutGraph
from edkm_export.artifact.encodings import CLOSE, Encode, Encoding, TextTokens
from edkm_export.errors import PackageError
from edkm_export.quantities import short_size

__all__ = ["OnnxEmbeddingArtifact", "check_embedding_interface", "embedding_feeds"]

_BATCH_TOKENS = 8192  # attention takes memory with the square of a text's length
_REFERENCE_WEIGHTS = 20_000_000  # the reference decodes every weight again for each text, on one core


def check_embedding_interface(graph: Graph) -> int:
    """Refuse a graph that is not an embedding model.

    Returns:
        Channels of an embedding.

    Raises:
        PackageError: an input or output is missing, unknown, or of another type or rank.
    """
    known = {INPUT_IDS, ATTENTION_MASK, TOKEN_TYPES}
    if not {INPUT_IDS, ATTENTION_MASK} <= graph.inputs.keys() <= known or set(graph.outputs) != {
        VECTORS,
        EMBEDDING,
    }:
        raise PackageError(
            f"{graph.path}: takes {', '.join(graph.inputs)} and gives {', '.join(graph.outputs)}; expected an "
            f"embedding model with {INPUT_IDS}, {ATTENTION_MASK}, {VECTORS} and {EMBEDDING}."
        )
    for name, value in graph.inputs.items():
        if value.dtype != np.int64 or len(value.shape) != 2:
            raise PackageError(f"{graph.path}: {name} is {value}, expected int64 [batch, tokens].")
    for name, rank in ((VECTORS, 3), (EMBEDDING, 2)):
        value = graph.outputs[name]
        if value.dtype.kind != "f" or len(value.shape) != rank or not isinstance(value.shape[-1], int):
            raise PackageError(f"{graph.path}: {name} is {value}, expected a float of rank {rank}.")
    return int(graph.outputs[EMBEDDING].shape[-1])


def embedding_feeds(
    graph: Graph, texts: Sequence[TextTokens], *, left: bool = False
) -> dict[str, NDArray[Any]]:
    """Inputs for a batch of texts.

    Args:
        graph: the embedding model.
        texts: of any lengths.
        left: padding stands before a text, not behind it.
    """
    width = max(len(text.ids) for text in texts)
    ids = np.zeros((len(texts), width), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        start = width - len(text.ids) if left else 0
        place = slice(start, start + len(text.ids))
        ids[row, place], mask[row, place] = text.ids.numpy(), 1
        mask[row, start : start + text.prompt] = 2
    feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask, TOKEN_TYPES: np.zeros_like(ids)}
    return {name: value for name, value in feeds.items() if name in graph.inputs}


def _batches(texts: Sequence[TextTokens]) -> Iterator[list[TextTokens]]:
    """Texts in their order, as many together as have so many tokens when padded."""
    batch: list[TextTokens] = []
    for text in texts:
        width = max(len(each.ids) for each in (*batch, text))
        if batch and (len(batch) + 1) * width > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    yield batch


class OnnxEmbeddingArtifact(GraphFiles):
    """A folder with an embedding model.

    Args:
        graph: as read.

    Raises:
        PackageError: it has another interface.
    """

    def __init__(self, graph: LutGraph) -> None:
        super().__init__(graph)
        check_embedding_interface(graph.graph)
        self.context = graph.description.context
        self.encodings = tuple(self._encodings())

    def __repr__(self) -> str:
        """One line: folder, profile, size."""
        return (
            f"OnnxEmbeddingArtifact({self.path.name}, {self.graph.profile}, {short_size(self.size_bytes())})"
        )

    def _encodings(self) -> list[Encoding]:
        rounds = self.graph.profile == "fast"
        exact = CLOSE["float32" if self.graph.outputs[EMBEDDING].dtype == np.float32 else "rounded"]
        coarse = CLOSE["int8"] if rounds else exact
        plain = Encoding(
            "execution-onnxruntime-plain",
            "onnxruntime, no optimization",
            exact.because("each node runs as it is written: a fault that an optimization hides shows here"),
            lambda texts: self._one_by_one(self.graph.runtime("disabled"), texts),
        )
        optimized = Encoding(
            "execution-onnxruntime",
            "onnxruntime, all optimizations",
            coarse,
            lambda texts: self._one_by_one(self.graph.runtime("all"), texts),
        )
        why = "a server runs texts of different lengths together; padding must change nothing"
        padded = Encoding(
            "execution-onnxruntime-padded",
            "onnxruntime, texts in batches, padded on the right",
            coarse.because(why),
            self._batch(left=False),
        )
        before = Encoding(
            "execution-onnxruntime-padded-left",
            "onnxruntime, texts in batches, padded on the left",
            coarse.because(why),
            self._batch(left=True),
        )
        # Those of one kind of optimization stand together: the graph is loaded once for them.
        order = [optimized, padded, *([before] if self.graph.description.pads_left else [])]
        return [*([plain, *order] if rounds else [*order, plain]), self._reference()]

    def _batch(self, *, left: bool) -> Encode:
        def encode(texts: Sequence[TextTokens]) -> Tensor:
            runtime = self.graph.runtime("all")
            rows = [
                runtime.run(embedding_feeds(self.graph.graph, batch, left=left))[EMBEDDING]
                for batch in _batches(texts)
            ]
            return torch.from_numpy(np.concatenate(rows)).float()

        return encode

    def _one_by_one(self, executor: Executor, texts: Sequence[TextTokens]) -> Tensor:
        rows = [executor.run(embedding_feeds(self.graph.graph, [text]))[EMBEDDING] for text in texts]
        return torch.from_numpy(np.concatenate(rows)).float()

    def _reference(self) -> Encoding:
        """The graph in onnx's own reference implementation, when it is small."""
        exact = CLOSE["float32" if self.graph.outputs[EMBEDDING].dtype == np.float32 else "rounded"]
        name, words = "execution-reference", "onnx's reference implementation"
        threshold = exact.because("it shares no code with onnxruntime, and rounds no activations")
        weights = sum(math.prod(shape) for shape, _ in self.graph.description.palettized.values())
        if weights > _REFERENCE_WEIGHTS:
            missing = f"takes too long for {weights:,} weights; it is run up to {_REFERENCE_WEIGHTS:,}"
            return Encoding(name, words, threshold, None, missing)

        def encode(texts: Sequence[TextTokens]) -> Tensor:
            feeds = embedding_feeds(self.graph.graph, texts)
            return torch.from_numpy(ReferenceRuntime(self.graph.graph).run(feeds)[EMBEDDING]).float()

        return Encoding(name, words, threshold, encode)
