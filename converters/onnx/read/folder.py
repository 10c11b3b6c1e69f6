"""Where the parts of an exported ONNX folder lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edkm_export.command_line import command_line
from edkm_export.errors import PackageError

__all__ = ["OnnxFolder", "is_onnx"]

# optimum and onnxruntime-genai look for the first, transformers.js for the second.
_MODELS = ("model.onnx", "onnx/model.onnx")


def is_onnx(path: str | Path) -> bool:
    """True for a file named .onnx, and for a folder with one where exporters put them."""
    path = Path(path)
    return path.suffix == ".onnx" or any(True for form in ("*.onnx", "onnx/*.onnx") for _ in path.glob(form))


@dataclass(frozen=True)
class OnnxFolder:
    """A folder with a graph.

    Attributes:
        root: the folder, with configuration and tokenizer.
        model: the graph in it.
    """

    root: Path
    model: Path

    @classmethod
    def find(cls, path: str | Path) -> OnnxFolder:
        """The folder that a user means by itself or by its model.

        Raises:
            PackageError: there is no model.
        """
        path = Path(path)
        if path.suffix == ".onnx" and not path.is_dir():
            inner = path.parent.name == "onnx" and not (path.parent / "config.json").is_file()
            return cls(path.parent.parent if inner else path.parent, path)
        for name in _MODELS:
            if (path / name).is_file():
                return cls(path, path / name)
        raise PackageError(
            f"{path}: expected a folder with {' or '.join(_MODELS)}, or an .onnx file; "
            f"make one with `{command_line('onnx', 'model.pt')}`."
        )

    @property
    def size_bytes(self) -> int:
        """Size of all files of the folder."""
        return sum(path.lstat().st_size for path in self.root.rglob("*") if not path.is_dir())
