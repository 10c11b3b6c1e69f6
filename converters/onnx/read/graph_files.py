"""What the verifier asks of the files of an exported folder, whatever its graph computes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from converters.onnx.read.lut_graph import LutGraph
from edkm_export.palette import PalettizedTensor

__all__ = ["KIND", "GraphFiles"]

KIND = "ONNX folder"


class GraphFiles:
    """The weights of a folder, and its sizes.

    Args:
        graph: as read.
    """

    kind = KIND

    def __init__(self, graph: LutGraph) -> None:
        self.graph = graph
        self.path: Path = graph.path

    def palettized(self) -> dict[str, PalettizedTensor]:
        """Palettized weights by parameter name, read from disk and followed through the graph."""
        return self.graph.palettized()

    def dense(self) -> dict[str, Tensor]:
        """Other initializers by name, read from disk."""
        return self.graph.dense()

    def weights_size_bytes(self) -> int:
        """Size of the external data."""
        return self.graph.weights_size_bytes

    def size_bytes(self) -> int:
        """Size of the folder."""
        return self.graph.size_bytes
