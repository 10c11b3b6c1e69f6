"""An exported ONNX folder as the verifier sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.onnx.format import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from converters.onnx.read.embedding_artifact import OnnxEmbeddingArtifact
from converters.onnx.read.executors import Executor, ReferenceRuntime
from converters.onnx.read.graph_files import KIND, GraphFiles
from converters.onnx.read.interface import batch_feeds, check_interface, held_cache, past_of
from converters.onnx.read.lut_graph import LutGraph, load_graph
from converters.onnx.read.observe import trace_graph
from converters.onnx.read.session import OnnxSession
from edkm_export.artifact.encodings import EmbeddingArtifact
from edkm_export.artifact.execution import ExecuteHeld, Execution
from edkm_export.artifact.protocol import Artifact, DamagedArtifact
from edkm_export.artifact.thresholds import EXECUTION, INT8_ACTIVATIONS, ExecutionThreshold
from edkm_export.errors import PackageError
from edkm_export.kv_cache import INT8, HeldCache, KVCache
from edkm_export.quantities import short_size

__all__ = ["KIND", "OnnxArtifact", "open_artifact"]

_WINDOW = 512  # positions of one execution; logits of more would only take memory
_REFERENCE_WEIGHTS = 20_000_000  # the reference decodes every weight again for each text, on one core
_PADDING = 5  # positions

_Run: TypeAlias = "tuple[Tensor, dict[str, NDArray[Any]]]"  # logits [positions, vocab_size], and what is kept


class OnnxArtifact(GraphFiles):
    """A folder with a decoder that has a cache.

    Args:
        graph: as read.

    Raises:
        PackageError: it has another interface.
    """

    def __init__(self, graph: LutGraph) -> None:
        super().__init__(graph)
        check_interface(graph.graph, graph.description.kv_cache)
        self.kv_cache: KVCache = graph.description.kv_cache
        self.context = min(_WINDOW, max(graph.description.context - _PADDING, 2))
        self.claimed_context = graph.description.context
        self.executions = tuple(self._executions())

    def __repr__(self) -> str:
        """One line: folder, profile, size."""
        return f"OnnxArtifact({self.path.name}, {self.graph.profile}, {short_size(self.size_bytes())})"

    def reach(self, context: int) -> None:
        """Run a token at the last position, alone.

        Raises:
            PackageError: its tables do not reach so far.
        """
        feeds = batch_feeds(self.graph.graph, [torch.zeros(1, dtype=torch.int64)], 1)
        if POSITION_IDS in feeds:
            feeds = {**feeds, POSITION_IDS: np.full_like(feeds[POSITION_IDS], context - 1)}
        self.graph.runtime("all").run(feeds)

    def session(self) -> OnnxSession:
        """The decoder with its cache, in the arithmetic of the first execution."""
        return OnnxSession(self.graph, self.graph.runtime("disabled" if self._rounds else "all"))

    def rounded_session(self) -> None:
        """None: onnxruntime cannot round after each op."""
        return None

    def trace(
        self, execution: str, tokens: Tensor, observe: Callable[[str, Tensor], None], cached: int = 0
    ) -> None:
        """Show the output of each node, run unoptimized by onnxruntime whatever the execution; see `Traceable`."""
        trace_graph(self.graph.graph, tokens, observe, cached)

    @property
    def _rounds(self) -> bool:
        """True when optimization lets the graph round activations to int8."""
        return self.graph.profile == "fast"

    def _executions(self) -> list[Execution]:
        exact = EXECUTION["float32" if self.graph.outputs[LOGITS].dtype == np.float32 else "rounded"]
        optimized = self._execution(
            "execution-onnxruntime",
            "onnxruntime, all optimizations",
            INT8_ACTIVATIONS if self._rounds else exact,
            self._optimized,
        )
        plain = self._execution(
            "execution-onnxruntime-plain",
            "onnxruntime, no optimization",
            exact.because(
                "onnxruntime rounds activations only for weights that it has folded, and so not here"
                if self._rounds
                else "each node runs as it is written: a fault that an optimization hides shows here"
            ),
            self._plain,
        )
        padded = self._execution(
            "execution-onnxruntime-padded",
            "onnxruntime, in a batch, padded on the left, half of the text in the cache",
            optimized.threshold.because(
                "a server runs texts of different lengths together; padding must change nothing"
            ),
            self._padded,
        )
        # Those of one kind of optimization stand together: the graph is loaded once for them.
        order = [plain, optimized, padded] if self._rounds else [optimized, padded, plain]
        return [*order, self._reference(exact)]

    def _execution(
        self, name: str, words: str, threshold: ExecutionThreshold, run: Callable[[Tensor], _Run]
    ) -> Execution:
        """An execution of a text."""
        return Execution(
            name,
            words,
            threshold,
            lambda tokens: run(tokens)[0],
            held=self._holding(run) if self.kv_cache == INT8 else None,
        )

    def _holding(self, run: Callable[[Tensor], _Run]) -> ExecuteHeld:
        def execute(tokens: Tensor) -> tuple[Tensor, HeldCache]:
            logits, past = run(tokens)
            return logits, held_cache(past, len(tokens))

        return execute

    def _optimized(self, tokens: Tensor) -> _Run:
        return self._run(self.graph.runtime("all"), tokens)

    def _plain(self, tokens: Tensor) -> _Run:
        return self._run(self.graph.runtime("disabled"), tokens)

    def _run(self, executor: Executor, tokens: Tensor) -> _Run:
        """One text without a past."""
        results = executor.run(batch_feeds(self.graph.graph, [tokens], len(tokens)))
        return torch.from_numpy(results[LOGITS][0]).float(), past_of(results)

    def _padded(self, tokens: Tensor) -> _Run:
        """A text beside a longer one, in two calls."""
        graph, runtime = self.graph.graph, self.graph.runtime("all")
        other = torch.cat([tokens.flip(0), tokens[:_PADDING]])[: self.graph.description.context]
        length, half = len(other), len(other) // 2
        feeds = batch_feeds(graph, [tokens, other], length)
        first = runtime.run(_columns(feeds, 0, half))
        second = runtime.run({**_columns(feeds, half, length), **past_of(first)})
        logits = np.concatenate([first[LOGITS][0], second[LOGITS][0]])
        return torch.from_numpy(logits[length - len(tokens) :]).float(), past_of(second)

    def _reference(self, exact: ExecutionThreshold) -> Execution:
        """The graph in onnx's own reference implementation, when it is small."""
        name, words = "execution-reference", "onnx's reference implementation"
        threshold = exact.because("it shares no code with onnxruntime, and rounds no activations")
        weights = sum(math.prod(shape) for shape, _ in self.graph.description.palettized.values())
        if weights > _REFERENCE_WEIGHTS:
            missing = f"takes too long for {weights:,} weights; it is run up to {_REFERENCE_WEIGHTS:,}"
            return Execution(name, words, threshold, None, missing)
        return self._execution(name, words, threshold, self._referenced)

    def _referenced(self, tokens: Tensor) -> _Run:
        return self._run(ReferenceRuntime(self.graph.graph), tokens)


def open_artifact(path: str | Path) -> Artifact | EmbeddingArtifact:
    """Open an ONNX folder, or the .onnx file in it, for the verifier; a broken one becomes a DamagedArtifact."""
    try:
        graph = load_graph(path)
        return (
            OnnxEmbeddingArtifact(graph)
            if graph.description.interface == "embedding"
            else OnnxArtifact(graph)
        )
    except PackageError as error:
        return DamagedArtifact(Path(path), KIND, str(error))


def _columns(feeds: Mapping[str, NDArray[Any]], start: int, stop: int) -> dict[str, NDArray[Any]]:
    """The inputs for positions from `start` to `stop`, and the cache as it is."""
    found = dict(feeds)
    for name in (INPUT_IDS, POSITION_IDS):
        if name in found:
            found[name] = found[name][:, start:stop]
    found[ATTENTION_MASK] = found[ATTENTION_MASK][:, :stop]
    return found
