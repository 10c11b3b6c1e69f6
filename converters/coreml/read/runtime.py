"""Packages in Apple's own Core ML runtime, which there is on macOS only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.coreml.backend import load_coremltools, quiet
from converters.coreml.read.description import Description
from converters.coreml.read.session import CoreMLSession
from edkm_export.artifact.execution import Execute
from edkm_export.errors import PackageError

__all__ = ["RuntimePackage", "predicting"]


class RuntimePackage:
    """An .mlpackage that is run by Core ML, with the interface of `Package` that a session needs.

    Compiled when it is first run: what the compiler refuses is then a fault of that run.

    Args:
        path: the package.
    """

    def __init__(self, path: Path) -> None:
        from converters.coreml.read.package import load_package

        declared = load_package(path)
        self.path, self.functions = declared.path, declared.functions
        self.default_function = declared.default_function
        self._several = len(declared.functions) > 1
        self._loaded: dict[str, Any] = {}

    def new_state(self, function: str | None = None) -> Any:
        """A fresh state, which all functions share."""
        return None if not self.functions[function or self.default_function].states else _LateState()

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        function: str | None = None,
        state: Any = None,
        precision: str = "",
    ) -> dict[str, Tensor]:
        """Predict. The precision is the device's.

        Raises:
            PackageError: the runtime refused the package or the inputs.
        """
        import torch

        name = function or self.default_function
        declared = self.functions[name].inputs
        given = {key: value.to(declared[key].type.dtype.stored).numpy() for key, value in inputs.items()}
        try:
            model = self._model(name)
            outputs = model.predict(given, **({} if state is None else {"state": state.of(model)}))
        except Exception as error:  # the runtime's own exceptions have no common base
            raise PackageError(f"the Core ML runtime refused the package: {error}") from error
        return {key: torch.from_numpy(value) for key, value in outputs.items()}

    def _model(self, function: str) -> Any:
        if function not in self._loaded:
            ct = load_coremltools()
            with quiet():
                self._loaded[function] = ct.models.MLModel(
                    str(self.path), function_name=function if self._several else None
                )
        return self._loaded[function]


class _LateState:
    """An MLState, made by the model that needs it first: making one takes a compiled model."""

    def __init__(self) -> None:
        self._state: Any = None

    def of(self, model: Any) -> Any:
        """The state, the same for each function of a package."""
        if self._state is None:
            self._state = model.make_state()
        return self._state


def predicting(paths: Sequence[Path], description: Description) -> Execute:
    """Run packages in Core ML, as an `Execute` of the artifact."""
    session: list[CoreMLSession] = []

    def execute(tokens: Tensor) -> Tensor:
        if not session:
            session.append(CoreMLSession([RuntimePackage(path) for path in paths], description))
        session[0].reset()
        return session[0].feed(tokens.long())

    return execute
