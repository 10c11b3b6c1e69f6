"""Hard PyTorch with a key-value cache: the reference that generated texts are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.context_window import require_room
from edkm_export.errors import CheckpointError
from edkm_export.kv_cache import FLOAT, KVCache
from edkm_export.memory_budget import room_if_needed
from edkm_export.reference.caching import new_cache, run_cached
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.taking_turns import taking_turns
from edkm_export.token_ids import Ids

__all__ = ["TorchSession"]


class TorchSession:
    """A model of transformers in the middle of a text.

    Args:
        model: transformers.PreTrainedModel in eval mode.
        where: what to call it in messages.
        kv_cache: how it holds keys and values.

    Attributes:
        context: most positions that it can hold.
        has_cache: true.
    """

    has_cache = True

    def __init__(self, model: Any, where: str = "the model", kv_cache: KVCache = FLOAT) -> None:
        self._model, self._kv_cache = model, kv_cache
        self._where = where
        self._vocab_size = int(model.config.vocab_size)
        self.context = int(model.config.max_position_embeddings)
        self.reset()

    @classmethod
    def of(cls, checkpoint: Checkpoint, room_bytes: int | None = None) -> TorchSession:
        """The model of a checkpoint in float32, its weights decoded.

        Args:
            checkpoint: the checkpoint.
            room_bytes: what decoded weights may take: where they take more, they are decoded layer by layer, for each
                token again. None: no limit.

        Raises:
            CheckpointError: see `load_hard_model`; or its configuration does not say how long a text may be.
        """
        room_bytes = room_if_needed(checkpoint.numel, room_bytes)
        model, where = (
            load_hard_model(checkpoint, room_bytes=room_bytes),
            str(checkpoint.path or "checkpoint"),
        )
        length = getattr(model.config, "max_position_embeddings", None)
        if type(length) is not int or length < 1:
            raise CheckpointError(
                f"{where}: max_position_embeddings of its configuration is {length!r}; palettize the model again."
            )
        return cls(model, where)

    def __repr__(self) -> str:
        """One line: model, positions taken."""
        name = type(self._model).__name__
        return f"TorchSession({name}, {self._used:,} of {self.context:,} positions taken)"

    @taking_turns
    def reset(self) -> None:
        """Forget the text."""
        self._cache = new_cache(self._model, self._kv_cache)
        self._used = 0

    @taking_turns
    @torch.no_grad()
    def feed(self, tokens: Ids) -> Tensor:
        """Go on with the text: ids [new], in any form that `as_ids` takes -> logits float32 [new, vocab_size].

        Raises:
            InputError: there is no room for the tokens, or one is outside the vocabulary.
        """
        ids = require_room(tokens, self._used, self.context, self._vocab_size, self._where)
        logits = run_cached(self._model, ids[None], self._cache)[0].float()
        self._used += len(ids)
        return logits
