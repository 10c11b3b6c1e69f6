"""What a row of `quality_peers` is judged by: its dequantized weights in transformers' own float32 model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.reference.conv1d import as_linear
from edkm_export.training.evaluation import evaluate

_DENSE_BITS = 16  # of a parameter that a row leaves as it is


@dataclass(frozen=True)
class Result:
    """Weights of a row.

    Attributes:
        weights: {parameter name: float [out, in]} of what changed.
        bits: {parameter name: its storage in bits}; others take 16 a value.
        settings: of the row, in words.
        versions: {package: version}.
    """

    weights: Mapping[str, Tensor]
    bits: Mapping[str, float]
    settings: str
    versions: Mapping[str, str]

    @classmethod
    def of_checkpoint(cls, made: Checkpoint, settings: str) -> Result:
        """A checkpoint of this project."""
        weights = {name: tensor.decode().float() for name, tensor in made.palettized.items()}
        weights |= {name: tensor.float() for name, tensor in made.dense.items()}
        bits: dict[str, float] = {name: tensor.size_bytes * 8.0 for name, tensor in made.palettized.items()}
        bits |= {name: tensor.numel() * tensor.element_size() * 8.0 for name, tensor in made.dense.items()}
        return cls(weights, bits, settings, made.provenance.get("versions", {}))


@dataclass(frozen=True)
class Judge:
    """The float model, and the texts.

    Attributes:
        original: float32, on the device that evaluates.
        texts: {name: windows int64 [windows, context]}.
    """

    original: Any
    texts: Mapping[str, Tensor]

    def floats(self) -> dict[str, dict[str, Any]]:
        """Measures of the float model, by text."""
        return {name: asdict(evaluate(self.original, windows)) for name, windows in self.texts.items()}

    def measure(self, result: Result) -> dict[str, dict[str, Any]]:
        """Measures of a row, by text.

        Raises:
            KeyError: a weight that the model does not have.
        """
        twin = copy.deepcopy(self.original)
        for name, values in as_linear(twin, result.weights).items():
            parameter = twin.get_parameter(name)
            assert parameter.shape == values.shape, name
            parameter.data = values.to(parameter.device, parameter.dtype)
        return {name: asdict(evaluate(twin, windows, self.original)) for name, windows in self.texts.items()}

    def bits_per_weight(self, result: Result) -> tuple[float, float]:
        """Of all that is stored, and of the decoder's matrices alone."""
        ends = (self.original.get_input_embeddings(), self.original.get_output_embeddings())
        outer = {id(module.weight) for module in ends if module is not None}
        stored = weights = inner_stored = inner_weights = 0.0
        for name, parameter in self.original.named_parameters():
            size = result.bits.get(name, _DENSE_BITS * parameter.numel())
            stored, weights = stored + size, weights + parameter.numel()
            if parameter.dim() > 1 and id(parameter) not in outer:
                inner_stored, inner_weights = inner_stored + size, inner_weights + parameter.numel()
        return stored / weights, inner_stored / max(1.0, inner_weights)
