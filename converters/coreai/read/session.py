"""A model in the middle of a text, run by Apple's runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from converters.coreai.format import (
    COLUMN_STATES,
    INPUT_IDS,
    KEY_CACHE,
    KEY_SCALES,
    LOGITS,
    MAIN,
    POSITION_IDS,
    RECURRENT_STATES,
    VALUE_CACHE,
    VALUE_SCALES,
)
from converters.coreai.read.asset import load_asset
from converters.coreai.read.observing import ObservedRuntime
from converters.coreai.read.running import RunningModel
from converters.coreai.read.runtime import zeros
from converters.coreai.read.static_session import StaticSession
from edkm_export.context_window import require_room
from edkm_export.kv_cache import HeldCache, HeldLayer
from edkm_export.taking_turns import taking_turns
from edkm_export.token_ids import Ids

__all__ = ["CoreAISession", "new_session", "open_session"]

_FIRST_LENGTH = 256
"""Positions of a new cache; it doubles when it is full, as in Apple's engine."""


class CoreAISession:
    """The function of the dynamic engine with its cache.

    Args:
        model: what is run.
        exact: run the file itself; otherwise its twin, see `rewriting`.
        runtime: runs it instead.

    Attributes:
        context: most positions that it can hold.
        has_cache: true.

    Raises:
        PackageError: the runtime refuses the file.
        BackendMissingError: coreai-core is not installed.
    """

    has_cache = True

    def __init__(
        self, model: RunningModel, *, exact: bool = False, runtime: ObservedRuntime | None = None
    ) -> None:
        told = model.asset.description
        self.context, self._vocab_size = told.context, told.vocab_size
        self._name = model.name
        self._runtime = runtime or (model.exact if exact else model.twin)
        self._states = model.asset.program.public[MAIN].states
        self.reset()

    @taking_turns
    def reset(self) -> None:
        """Forget the text."""
        self._used, self._length = 0, min(_FIRST_LENGTH, self.context)
        for name, kind in self._states.items():
            self._runtime.set_state(name, zeros(kind, {3: self._length}))

    def __repr__(self) -> str:
        """One line: model, positions taken."""
        return f"CoreAISession({self._name}, {self._used:,} of {self.context:,} positions taken)"

    @taking_turns
    def feed(self, tokens: Ids) -> Tensor:
        """Go on with the text: ids [new], in any form that `as_ids` takes -> logits float32 [new, vocab_size].

        Raises:
            InputError: there is no room for the tokens, or one is outside the vocabulary.
            PackageError: the runtime fails.
        """
        ids = require_room(tokens, self._used, self.context, self._vocab_size, self._name)
        total = self._used + len(ids)
        self._make_room(total)
        inputs = {
            INPUT_IDS: ids[None].to(torch.int32).numpy(),
            POSITION_IDS: np.arange(total, dtype=np.int32)[None],
        }
        outputs = self._runtime.call(MAIN, inputs, states={name: name for name in self._states})
        self._used = total
        return torch.from_numpy(outputs[LOGITS][0]).float()

    def _make_room(self, total: int) -> None:
        if total <= self._length:
            return
        while self._length < total:
            self._length *= 2
        self._length = min(self._length, self.context)
        for name in self._states.keys() - {COLUMN_STATES, RECURRENT_STATES}:
            self._runtime.grow_state(name, 3, self._length)

    @taking_turns
    def held(self) -> HeldCache:
        """Keys and values of the text so far, of a model that holds them as int8."""
        names = (KEY_CACHE, KEY_SCALES, VALUE_CACHE, VALUE_SCALES)
        parts = [torch.from_numpy(self._runtime.state(name)[:, 0, :, : self._used]) for name in names]
        return [HeldLayer(*layer) for layer in zip(*parts, strict=True)]


def new_session(
    model: RunningModel, *, exact: bool = False, runtime: ObservedRuntime | None = None
) -> CoreAISession | StaticSession:
    """A session of the interface that the model has.

    Args:
        model: what is run.
        exact: run the file itself, not its twin.
        runtime: runs it instead.
    """
    kind = CoreAISession if model.asset.description.interface == "dynamic" else StaticSession
    return kind(model, exact=exact, runtime=runtime)


def open_session(path: str | Path, *, exact: bool = False) -> CoreAISession | StaticSession:
    """Open an .aimodel, or the one in a folder.

    Args:
        path: of it.
        exact: run the file itself, not its twin.
    """
    return new_session(RunningModel(load_asset(path)), exact=exact)
