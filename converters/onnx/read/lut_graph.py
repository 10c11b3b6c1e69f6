"""Reading an exported ONNX graph without a runtime, and running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.onnx.format import CODES, PARTS, part_name
from converters.onnx.read.description import Description, read_description
from converters.onnx.read.executors import OnnxRuntime, Optimization
from converters.onnx.read.folder import OnnxFolder
from converters.onnx.read.graph import Graph, ValueType, read_graph
from converters.onnx.read.storage import read_palette
from converters.onnx.read.wiring import Wiring
from edkm_export.array_input import as_tensor
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor
from edkm_export.quantities import short_size

__all__ = ["LutGraph", "load_graph"]

_CODES = part_name("", CODES)  # ends the names of initializers that hold codes


class LutGraph:
    """An exported graph on disk. Weights are read when they are needed.

    Args:
        folder: where it lies.
        graph: as read and checked.

    Attributes:
        folder: where it lies.
        graph: its nodes and initializers.
        path: of the folder.
        description: what its metadata say.
    """

    def __init__(self, folder: OnnxFolder, graph: Graph) -> None:
        self.folder = folder
        self.graph = graph
        self.path: Path = folder.root
        self.description: Description = read_description(graph.metadata, graph.path)

    def __repr__(self) -> str:
        """One line: name, profile, palettized weights, context, size."""
        found = self.description
        return (
            f"LutGraph({self.path.name}, {self.profile}, {len(found.palettized)} palettized weights, "
            f"{found.context:,} positions, {short_size(self.size_bytes)})"
        )

    @property
    def profile(self) -> str:
        """Runtime profile: "exact", "low-memory" or "fast"."""
        return self.description.profile

    @property
    def inputs(self) -> Mapping[str, ValueType]:
        """Inputs by name."""
        return self.graph.inputs

    @property
    def outputs(self) -> Mapping[str, ValueType]:
        """Outputs by name."""
        return self.graph.outputs

    @property
    def size_bytes(self) -> int:
        """Size of all files of the folder."""
        return self.folder.size_bytes

    @property
    def weights_size_bytes(self) -> int:
        """Size of the external data."""
        return self.graph.external.size_bytes

    def op_counts(self) -> dict[str, int]:
        """How many nodes of each operator there are; sorted."""
        return dict(sorted(Counter(node.op for node in self.graph.nodes).items()))

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Read the palettized weights from the bytes on disk, and follow each one through the graph.

        Raises:
            PackageError: one is damaged, or the graph computes with something else.
        """
        return dict(self._palettized)

    @cached_property
    def _palettized(self) -> dict[str, PalettizedTensor]:
        stored = {name.removesuffix(_CODES) for name in self.graph.tensors if name.endswith(_CODES)}
        if different := sorted(stored ^ self.description.palettized.keys()):
            state = "in the graph, but not in its metadata" if different[0] in stored else "not in the graph"
            raise PackageError(f"{self.graph.path}: {different[0]}: its codes are {state}; export it again.")
        wiring = Wiring(self.graph, stored)
        if stored and wiring.profile != self.profile:
            raise PackageError(
                f"{self.graph.path}: its metadata say that its profile is {self.profile}, but its nodes are those of "
                f"{wiring.profile}; export it again."
            )
        found = {
            name: read_palette(self.graph.tensors, name, shape, n_bits, str(self.graph.path))
            for name, (shape, n_bits) in self.description.palettized.items()
        }
        for palette in found.values():
            wiring.check(palette)
        return found

    def dense(self) -> dict[str, Tensor]:
        """Read all initializers that are not part of a palettized weight, by name; constants are among them.

        Raises:
            PackageError: a parameter that the metadata name is missing, has another shape, or nothing uses it.
        """
        parts = {part_name(name, part) for name in self.description.palettized for part in PARTS}
        for name, shape in self.description.dense.items():
            tensor = self.graph.tensors.get(name)
            if tensor is None or tensor.shape != shape:
                state = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise PackageError(f"{self.graph.path}: {name} is {state}, expected shape {list(shape)}.")
            if name not in self.graph.users:
                raise PackageError(f"{self.graph.path}: {name}: nothing uses it; export it again.")
        return {
            name: torch.from_numpy(tensor.copy())
            for name, tensor in self.graph.tensors.items()
            if name not in parts
        }

    def run(self, inputs: Mapping[str, Any], *, optimization: Optimization = "all") -> dict[str, Tensor]:
        """Run the graph in onnxruntime.

        Args:
            inputs: tensors, numpy arrays or lists by name, of the declared type; integers of any width.
            optimization: of the graph at load, "all" or "disabled".

        Returns:
            Outputs by name.

        Raises:
            InputError: an input is missing, unknown, or of another type or shape.
            PackageError: onnxruntime refuses the graph, or it fails.
            BackendMissingError: onnxruntime is not installed.
        """
        feeds = {name: self._feed(name, value) for name, value in inputs.items()}
        results = self.runtime(optimization).run(feeds)
        return {name: torch.from_numpy(value) for name, value in results.items()}

    def _feed(self, name: str, value: Any) -> NDArray[Any]:
        """An input as an array. Lists take the declared type; integers the declared width."""
        array: NDArray[Any] = as_tensor(value, f"{self.graph.path}: {name}").numpy()
        declared = self.inputs.get(name)
        if declared is None or array.dtype == declared.dtype:
            return array
        integers = array.dtype.kind in "iu" and declared.dtype.kind in "iu"
        if isinstance(value, (list, tuple)) or integers:
            return array.astype(declared.dtype)
        return array

    def runtime(self, optimization: Optimization = "all") -> OnnxRuntime:
        """The graph in onnxruntime. The last one is kept, and no more: each holds all weights."""
        if optimization not in self._runtimes:
            self._runtimes.clear()
            self._runtimes[optimization] = self.new_runtime(optimization)
        return self._runtimes[optimization]

    def new_runtime(self, optimization: Optimization = "all", threads: int | None = None) -> OnnxRuntime:
        """The graph in onnxruntime, loaded again."""
        keep = self.profile != "low-memory"
        return OnnxRuntime(self.graph, optimization=optimization, threads=threads, keep=keep)

    @cached_property
    def _runtimes(self) -> dict[Optimization, OnnxRuntime]:
        return {}


def load_graph(path: str | Path) -> LutGraph:
    """Read an exported folder, or the .onnx file in it.

    Raises:
        PackageError: it is damaged, hostile, or not made by this exporter.
        BackendMissingError: onnx is not installed.
    """
    folder = OnnxFolder.find(Path(path))
    return LutGraph(folder, read_graph(folder.model))
