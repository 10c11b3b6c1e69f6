"""Models that the ladder runs: anything that turns a window of tokens into logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import PackageError

__all__ = ["Execute", "coreml_runtime", "interpreted", "transformers_model"]

Execute = Callable[[Tensor], Tensor]
"""int64 [positions] -> logits float32 [positions, vocab_size]."""


def transformers_model(model: Any) -> Execute:
    """Run a model of transformers."""

    @torch.no_grad()
    def execute(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
        return logits.float()

    return execute


def interpreted(package: Any, precision: str) -> Execute:
    """Run a Core ML package with whole-sequence logits in our interpreter, at "float32", "rounded" or "float16"."""
    length = sequence_length(package)

    def execute(tokens: Tensor) -> Tensor:
        outputs = package.run({"input_ids": _pad(tokens, length)}, precision=precision)
        return outputs["logits"][0, : len(tokens)].float()  # type: ignore[no-any-return]

    return execute


def coreml_runtime(path: str, length: int) -> Execute:
    """Run a Core ML package in Apple's runtime; macOS only."""
    import coremltools

    model = coremltools.models.MLModel(path)

    def execute(tokens: Tensor) -> Tensor:
        outputs = model.predict({"input_ids": _pad(tokens, length).int().numpy()})
        return torch.from_numpy(outputs["logits"])[0, : len(tokens)].float()

    return execute


def sequence_length(package: Any) -> int:
    """Positions of the package's `input_ids`.

    Raises:
        PackageError: it is not a whole-sequence logits package.
    """
    function = package.functions[package.default_function]
    shapes = {name: given.type.shape for name, given in function.inputs.items()}
    if set(shapes) != {"input_ids"} or "logits" not in function.outputs or function.states:
        raise PackageError(
            f"{package.path}: function '{function.name}' takes {', '.join(shapes) or 'nothing'}, expected `input_ids` "
            "and an output `logits`; only packages with whole-sequence logits can be verified."
        )
    size = shapes["input_ids"][-1] if shapes["input_ids"] else None
    if not isinstance(size, int):
        raise PackageError(
            f"{package.path}: `input_ids` has shape {shapes['input_ids']}, expected a fixed length."
        )
    return size


def _pad(tokens: Tensor, length: int) -> Tensor:
    """[positions] -> int32 [1, length]; what follows a position does not change its logits."""
    return torch.nn.functional.pad(tokens, (0, length - len(tokens)))[None].int()
