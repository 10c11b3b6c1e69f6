"""A model with the processes that run it: the file itself, and its twin."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from converters.coreai.format import ASSET_SUFFIX
from converters.coreai.read.asset import Asset
from converters.coreai.read.composed import check_composed
from converters.coreai.read.interface import check_interface
from converters.coreai.read.observing import ObservedRuntime
from converters.coreai.read.runtime import DEADLINE_S, AppleRuntime, Child
from edkm_export.errors import PackageError

__all__ = ["RunningModel"]


class RunningModel:
    """Processes are started when they are first needed, and end with this object.

    Args:
        asset: as read.
        deadline_s: longest wait for one call.

    Raises:
        PackageError: the program has another interface than its description says.
    """

    def __init__(self, asset: Asset, *, deadline_s: float = DEADLINE_S) -> None:
        try:
            check_interface(asset.program, asset.description)
            check_composed(asset.program)
        except PackageError as error:
            raise PackageError(f"{asset.path}: {error}") from error
        self.asset, self._deadline_s = asset, deadline_s

    def close(self) -> None:
        """End all processes and remove what they left; without, that happens with this object."""
        for name in ("exact", "twin"):
            if name in self.__dict__:
                self.__dict__[name].close()
        if "_folder" in self.__dict__:
            self._folder.cleanup()

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.asset.path)

    @cached_property
    def exact(self) -> AppleRuntime:
        """The file itself; it loads while other things are done."""
        return self._start(self.asset.path)

    @cached_property
    def twin(self) -> AppleRuntime:
        """The twin: the same program with decoded weights and float32 products, see `rewriting`."""
        return self._start(self._write_twin("twin", observed=False)[0])

    def observed(self) -> ObservedRuntime:
        """The twin once more, which shows what happens inside."""
        path, values = self._write_twin("observed", observed=True)
        return ObservedRuntime(self._start(path), values)

    def _write_twin(self, name: str, *, observed: bool) -> tuple[Path, dict[str, dict[str, str]]]:
        path = Path(self._folder.name) / f"{name}{ASSET_SUFFIX}"
        if path.exists():
            shutil.rmtree(path)
        child = Child(self.name, self._deadline_s)
        try:
            answer, _ = child.ask(
                {"do": "twin", "path": self.name, "output": str(path), "observed": observed}
            )
        finally:
            child.close()
        return path, answer["values"]

    def decoded(self) -> Iterator[tuple[str, Tensor]]:
        """Weights as the runtime decodes them from the palettes on disk: name, float16 `shape`.

        Raises:
            PackageError: the runtime fails.
        """
        names: dict[str, list[str]] = {}
        for name, told in self.asset.description.palettized.items():
            names.setdefault(told.digest, []).append(name)
        child = Child(self.name, self._deadline_s)
        path = Path(self._folder.name) / f"decoders{ASSET_SUFFIX}"
        try:
            for answer, arrays in child.ask_many({"do": "decode", "path": self.name, "output": str(path)}):
                for name in names.get(answer["digest"], []):
                    shape = self.asset.description.palettized[name].shape
                    yield name, torch.from_numpy(arrays["weight"].copy()).view(shape)
        finally:
            child.close()

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="edkm-export-coreai-")

    def _start(self, path: Path) -> AppleRuntime:
        functions = self.asset.program.public
        return AppleRuntime(path, functions, self.name, deadline_s=self._deadline_s)
