"""An exported graph in the middle of a text, through onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converters.onnx.backend import load_onnxruntime
from converters.onnx.format import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from converters.onnx.read.executors import OnnxRuntime, Optimization
from converters.onnx.read.interface import check_interface, empty_cache, held_cache, past_of
from converters.onnx.read.lut_graph import LutGraph, load_graph
from edkm_export.context_window import require_room
from edkm_export.kv_cache import HeldCache
from edkm_export.taking_turns import taking_turns
from edkm_export.token_ids import Ids

__all__ = ["OnnxSession"]


class OnnxSession:
    """A decoder with cache in onnxruntime; keys and values stay in its own memory from call to call.

    Args:
        graph: of a decoder with cache.
        runtime: with the graph loaded; None: loaded with full optimization.

    Attributes:
        context: most positions that it can hold.
        has_cache: true.

    Raises:
        PackageError: it is not a decoder with cache, or onnxruntime refuses it.
        BackendMissingError: onnxruntime is not installed.
    """

    has_cache = True

    def __init__(self, graph: LutGraph, runtime: OnnxRuntime | None = None) -> None:
        self._vocab_size = check_interface(graph.graph, graph.description.kv_cache)
        self.context = graph.description.context
        self._graph = graph.graph
        self._runtime = runtime or graph.runtime()
        self._value = load_onnxruntime().OrtValue.ortvalue_from_numpy
        self.reset()

    @classmethod
    def open(
        cls, path: str | Path, *, optimization: Optimization = "all", threads: int | None = None
    ) -> OnnxSession:
        """Read, check and load the graph of a folder.

        Args:
            path: of the folder, or of the .onnx file in it.
            optimization: of the graph at load, "all" or "disabled".
            threads: of one operation; None: as many as there are cores.
        """
        graph = load_graph(path)
        check_interface(graph.graph, graph.description.kv_cache)  # before onnxruntime spends time on it
        return cls(graph, graph.new_runtime(optimization, threads))

    def __repr__(self) -> str:
        """One line: folder, positions taken."""
        name = self._graph.path.name
        return f"OnnxSession({name}, {self._used:,} of {self.context:,} positions taken)"

    @taking_turns
    def reset(self) -> None:
        """Forget the text."""
        self._used = 0
        self._cache: dict[str, Any] = {
            name: self._value(value) for name, value in empty_cache(self._graph, batch=1).items()
        }

    @taking_turns
    def feed(self, tokens: Ids) -> Tensor:
        """Go on with the text: ids [new], in any form that `as_ids` takes -> logits float32 [new, vocab_size].

        Raises:
            InputError: there is no room for the tokens, or one is outside the vocabulary.
            PackageError: the graph fails.
        """
        ids = require_room(tokens, self._used, self.context, self._vocab_size, str(self._graph.path))
        total = self._used + len(ids)
        feeds = {
            INPUT_IDS: ids[None].numpy(),
            ATTENTION_MASK: np.ones((1, total), np.int64),
            POSITION_IDS: np.arange(self._used, total, dtype=np.int64)[None],
        }
        values = {name: self._value(value) for name, value in feeds.items() if name in self._graph.inputs}
        results = self._runtime.run_values({**values, **self._cache})
        logits = torch.from_numpy(results[LOGITS].numpy())[0].float()
        self._cache = past_of(results)
        self._used = total
        return logits

    @taking_turns
    def held(self) -> HeldCache:
        """Keys and values of the text so far, of a graph that holds them as int8."""
        return held_cache({name: value.numpy() for name, value in self._cache.items()}, self._used)
