"""Programs that run a graph: onnxruntime, and onnx's own reference implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from converters.onnx.backend import load_onnx, load_onnxruntime
from converters.onnx.read.graph import Graph
from edkm_export.errors import InputError, PackageError
from edkm_export.memory import return_freed_memory, return_large_blocks

__all__ = ["Executor", "OnnxRuntime", "Optimization", "ReferenceRuntime", "check_feeds"]

Array = NDArray[Any]
Optimization = Literal["all", "disabled"]


class Executor(Protocol):
    """Runs a graph on arrays."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs by name to outputs by name."""


_ATTENDS = (1, 23, 2)  # 1.23.0 gives wrong results for grouped queries


class OnnxRuntime:
    """A graph in onnxruntime on the CPU.

    Args:
        graph: checked; its files are opened again by onnxruntime.
        optimization: of the graph at load: "all", or "disabled", so that each node runs as it is written.
        threads: of one operation; None: as many as there are cores.
        keep: hold on to memory that was used, for speed; without, a decoded weight is given back at once.

    Raises:
        PackageError: onnxruntime refuses the model.
        BackendMissingError: it is not installed.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        optimization: Optimization = "all",
        threads: int | None = None,
        keep: bool = True,
    ) -> None:
        self._graph = graph
        ort = load_onnxruntime()
        version = tuple(int(part) for part in ort.__version__.split(".")[:3] if part.isdecimal())
        if version < _ATTENDS and any((node.domain, node.op) == ("", "Attention") for node in graph.nodes):
            raise PackageError(
                f"{graph.path}: onnxruntime {ort.__version__} computes its Attention wrongly or not at all; install "
                "1.23.2 or a newer one, or export with --opset 18."
            )
        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimization == "all" else levels.ORT_DISABLE_ALL
        )
        if threads is not None:
            options.intra_op_num_threads = threads
        if not keep:
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            return_large_blocks()
        try:
            self.session = ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise PackageError(f"{graph.path}: onnxruntime refuses it: {_first_line(error)}") from error
        return_freed_memory()  # folding tables into weights took several times their size
        self._outputs = list(graph.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays.

        Raises:
            InputError: an input is missing, unknown, or of another type or shape.
            PackageError: the graph fails.
        """
        check_feeds(self._graph, feeds)
        try:
            results = self.session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise PackageError(f"{self._graph.path}: fails in onnxruntime: {_first_line(error)}") from error
        return dict(zip(self._outputs, results, strict=True))

    def run_values(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run on OrtValues, which are not copied; a cache goes around in them.

        Raises:
            PackageError: the graph fails.
        """
        try:
            results = self.session.run_with_ort_values(self._outputs, dict(feeds))
        except Exception as error:
            raise PackageError(f"{self._graph.path}: fails in onnxruntime: {_first_line(error)}") from error
        return dict(zip(self._outputs, results, strict=True))


class ReferenceRuntime:
    """A graph in onnx's ReferenceEvaluator: numpy, one node after the other; slow, and shares no code with onnxruntime.

    Args:
        graph: checked.

    Raises:
        PackageError: onnx refuses the model, or has no implementation of one of its operators.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        onnx = load_onnx()
        from onnx.reference import ReferenceEvaluator

        from converters.onnx.read.contrib import contrib_operators

        try:
            model = onnx.load_model(str(graph.path))
            self._evaluator = ReferenceEvaluator(model, new_ops=contrib_operators())
        except Exception as error:
            raise PackageError(f"{graph.path}: onnx refuses it: {_first_line(error)}") from error
        self._outputs = list(graph.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays.

        Raises:
            InputError: an input is missing, unknown, or of another type or shape.
            PackageError: the graph fails.
        """
        check_feeds(self._graph, feeds)
        try:
            with np.errstate(all="ignore"):
                results = self._evaluator.run(self._outputs, dict(feeds))
        except Exception as error:
            raise PackageError(
                f"{self._graph.path}: fails in onnx's reference: {_first_line(error)}"
            ) from error
        return dict(zip(self._outputs, results, strict=True))


def check_feeds(graph: Graph, feeds: Mapping[str, Array]) -> None:
    """Compare inputs with what the graph declares.

    Raises:
        InputError: one is missing, unknown, or of another type or shape; or a size that has a name differs.
    """
    if missing := sorted(graph.inputs.keys() - feeds.keys()):
        raise InputError(f"{graph.path}: input {missing[0]!r} is missing.")
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in feeds.items():
        if name not in graph.inputs:
            raise InputError(f"{graph.path}: no input {name!r}; it has {', '.join(graph.inputs)}.")
        declared = graph.inputs[name]
        fits = value.dtype == declared.dtype and value.ndim == len(declared.shape)
        if not fits or any(
            isinstance(size, int) and size != found
            for size, found in zip(declared.shape, value.shape, strict=False)
        ):
            raise InputError(
                f"{graph.path}: {name} is {value.dtype} {list(value.shape)}, expected {declared}."
            )
        for size, found in zip(declared.shape, value.shape, strict=True):
            if isinstance(size, str) and size and sizes.setdefault(size, (found, name))[0] != found:
                other = sizes[size]
                raise InputError(f"{graph.path}: {size} is {found} in {name}, but {other[0]} in {other[1]}.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
