"""Hard PyTorch that reads the int8 keys and values of an artifact: what its logits must be.

A text that two sound computations hold as int8 soon differs in some codes, since rounding turns a millionth into a
step: with SmolLM2-135M that alone moves predictions by half of what int8 costs. So each is compared with the model that
reads its very codes, and the codes with that model's floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edkm_export.artifact.execution import Execute, ExecuteHeld
from edkm_export.kv_cache import HeldCache
from edkm_export.reference.caching import run_cached
from edkm_export.reference.int8_cache import Misfit, held_cache

__all__ = ["Reader"]


class Reader:
    """Hard PyTorch beside an artifact.

    Args:
        model: transformers.PreTrainedModel.

    Attributes:
        expected: logits float32 [positions, vocab_size] of each text that was read.
        misfit: of all of them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.expected: list[Tensor] = []
        self.misfit = Misfit()

    @torch.no_grad()
    def read(self, tokens: Tensor, held: HeldCache) -> Tensor:
        """Logits float32 [positions, vocab_size] of a text, from the keys and values that an artifact holds of it.

        Raises:
            PackageError: it holds other layers, heads or tokens than the model has.
        """
        cache = held_cache(self._model, held, self.misfit)
        return run_cached(self._model, tokens[None], cache)[0].float()

    def beside(self, execute: ExecuteHeld) -> Execute:
        """The execution, after which `expected` holds what it should give."""

        def run(tokens: Tensor) -> Tensor:
            logits, held = execute(tokens)
            self.expected.append(self.read(tokens, held))
            return logits

        return run
