"""What coremltools takes for Core ML: predictions and states by the interpreter.

`Predictor` has the methods that `coremltools.models.MLModel` calls on its binding of the macOS framework.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converters.coreml import load_package
from converters.coreml.read.images import from_image, to_image
from converters.coreml.read.program import Function
from converters.coreml.read.values import TensorType
from edkm_export.errors import EdkmExportError, InputError

__all__ = ["Diary", "NoProgram", "Predictor"]


class NoProgram(RuntimeError):
    """A test asks for what is no ML program: a neural network, or what Core ML's compiler makes."""


@dataclass
class Diary:
    """What the predictors did during one test.

    Attributes:
        predictions: how many succeeded.
        fault: what the last one that failed raised.
        arrays: all that were predicted.
        half: arrays that a program with float16 in it made.
    """

    predictions: int = 0
    fault: Exception | None = None
    arrays: list[np.ndarray] = field(default_factory=list)
    half: list[np.ndarray] = field(default_factory=list)

    def made(self, *arrays: Any) -> int:
        """How many of these are predictions."""
        return sum(any(one is made for made in self.arrays) for one in arrays)

    def rounded(self, *arrays: Any) -> bool:
        """Tell whether one of these came out of a program with float16 in it."""
        return any(one is made for one in arrays for made in self.half)


class _State:
    """The states of a model during a conversation."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read_state(self, name: str) -> np.ndarray:
        return self.tensors[name].numpy().copy()

    def write_state(self, name: str, value: np.ndarray) -> None:
        self.tensors[name] = torch.from_numpy(np.array(value)).to(self.tensors[name].dtype)


class Predictor:
    """A model that predicts in our interpreter.

    Args:
        path: of the .mlpackage; of another model, which is refused as the framework would refuse it.
        compute_units, hints, asset: without meaning here.
        function: the function to run; the default one when empty.
    """

    precision = "float32"
    diary = Diary()

    def __init__(self, path: str, compute_units: str, function: str, hints: Any, asset: Any) -> None:
        if not path.rstrip("/").endswith(".mlpackage"):
            raise NoProgram(f"{path or 'an asset in memory'} holds no ML program on disk")
        self._path, self._function = path, function or None
        self._fault: Exception | None = None
        self._predict_ns, started = 0, time.perf_counter_ns()
        try:
            self._package = load_package(path)
        except EdkmExportError as error:
            self._fault = (
                error  # told when it is asked to predict, as a model that only converts needs no interpreter
            )
        else:
            if function and function not in self._package.functions:
                raise RuntimeError(f"{path} has no function {function!r}")
        self._load_ns = time.perf_counter_ns() - started

    @staticmethod
    def maximum_supported_specification_version() -> int:
        """Of macOS 15."""
        return 9

    def get_compiled_model_path(self) -> str:
        """The package itself, which stands in for what Core ML would compile it to."""
        return self._path

    def get_load_duration_in_nano_seconds(self) -> int:
        """Time that loading took."""
        return self._load_ns

    def get_last_predict_duration_in_nano_seconds(self) -> int:
        """Time of the last prediction."""
        return self._predict_ns

    def newState(self) -> _State:
        """A fresh state."""
        return _State(self._package.new_state(self._function))

    def predict(self, data: Mapping[str, Any], state: _State | None) -> dict[str, Any]:
        """Predict; inputs are converted to the declared types, as Core ML does."""
        started = time.perf_counter_ns()
        try:
            if self._fault is not None:
                raise self._fault
            function = self._package.functions[self._function or self._package.default_function]
            given = {name: _given(function, name, value) for name, value in data.items()}
            outputs = self._package.run(
                given,
                function=self._function,
                state=None if state is None else state.tensors,
                precision=self.precision,
            )
            result = {name: _returned(function, name, value) for name, value in outputs.items()}
        except InputError as error:
            Predictor.diary.fault = error
            raise RuntimeError(f"Unable to compute the prediction using ML Program: {error}") from error
        except Exception as error:
            Predictor.diary.fault = error
            raise
        Predictor.diary.predictions += 1
        self._predict_ns = time.perf_counter_ns() - started
        arrays = [value for value in result.values() if isinstance(value, np.ndarray)]
        Predictor.diary.arrays += arrays
        if any(kind.dtype.name == "float16" for kind in _types(function)):
            Predictor.diary.half += arrays
        return result

    def batchPredict(self, data: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Predict for each of several inputs."""
        return [self.predict(one, None) for one in data]


def _given(function: Function, name: str, value: Any) -> Any:
    """An input as a tensor of the declared type, as Core ML converts it."""
    if name in function.images and not isinstance(value, np.ndarray):
        return from_image(value, function.inputs[name], function.images[name])
    if not isinstance(value, np.ndarray) or name not in function.inputs:
        return value
    declared = function.inputs[name].type
    tensor = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    if declared.shape == () and tensor.numel() == 1:
        tensor = tensor.reshape(())
    return tensor.to(declared.dtype.compute)


def _types(function: Function) -> Iterator[TensorType]:
    yield from (given.type for given in function.inputs.values())
    for operation in function.all_operations:
        yield from (output.type for output in operation.outputs)


def _returned(function: Function, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if name in function.images:
        return to_image(value, function.images[name], name)
    return value.reshape(1).numpy() if value.dim() == 0 else value.numpy()
