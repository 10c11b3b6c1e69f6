"""A model of the static engine in the middle of a text, called as `CoreAIStaticShapeEngine.swift` does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from converters.coreai.format import (
    CAUSAL_MASK,
    EMBEDDING_TABLE,
    EXTEND,
    GATHERED,
    IN_STEP,
    LOAD_EMBEDDINGS,
    POSITION_IDS,
    QUERY_LENGTHS,
    STATIC_KEY_CACHE,
    STATIC_LOGITS,
    STATIC_VALUE_CACHE,
    TOKEN_IDS,
    TRANSFORMER_INPUT,
    context_ladder,
    gather_name,
    step_name,
)
from converters.coreai.read.observing import ObservedRuntime
from converters.coreai.read.running import RunningModel
from converters.coreai.read.runtime import zeros
from edkm_export.context_window import require_room
from edkm_export.taking_turns import taking_turns
from edkm_export.token_ids import Ids

__all__ = ["StaticSession"]

_STATES = (STATIC_KEY_CACHE, STATIC_VALUE_CACHE)
_FORBIDDEN = -40000.0  # what the engine writes into its mask


class StaticSession:
    """The functions of the static engine with their cache.

    A call begins at a multiple of its number of tokens, so that some tokens are fed again.

    Args:
        model: what is run.
        exact: run the file itself; otherwise its twin, see `rewriting`.
        runtime: runs it instead.

    Attributes:
        context: most positions that it can hold.
        has_cache: true.
        step: function that is called, `extend`; with `prompt_opt`, which only fills the cache, logits are NaN. The
            twin has no `prompt_opt`.

    Raises:
        PackageError: the runtime refuses the file.
        BackendMissingError: coreai-core is not installed.
    """

    has_cache = True

    def __init__(
        self, model: RunningModel, *, exact: bool = False, runtime: ObservedRuntime | None = None
    ) -> None:
        told = model.asset.description
        self.step = EXTEND
        self.context, self._vocab_size = told.context, told.vocab_size
        self._name, self._ladder = model.name, context_ladder(told.context)
        self._functions = model.asset.program.public
        self._runtime = runtime or (model.exact if exact else model.twin)
        self._runtime.call(LOAD_EMBEDDINGS, {}, keep={EMBEDDING_TABLE: EMBEDDING_TABLE})
        self.reset()

    @taking_turns
    def reset(self) -> None:
        """Forget the text."""
        self._text = torch.empty(0, dtype=torch.long)
        self._length = self._ladder[0]
        states = self._functions[step_name(EXTEND, self._length, QUERY_LENGTHS[0])].states
        for name in _STATES:
            self._runtime.set_state(name, zeros(states[name], {}))

    def __repr__(self) -> str:
        """One line: model, positions taken."""
        return f"StaticSession({self._name}, {len(self._text):,} of {self.context:,} positions taken)"

    @taking_turns
    def feed(self, tokens: Ids) -> Tensor:
        """Go on with the text: ids [new], in any form that `as_ids` takes -> logits float32 [new, vocab_size].

        Raises:
            InputError: there is no room for the tokens, or one is outside the vocabulary.
            PackageError: the runtime fails.
        """
        position = len(self._text)
        ids = require_room(tokens, position, self.context, self._vocab_size, self._name)
        self._text = torch.cat([self._text, ids])
        total, found = len(self._text), []
        while position < total:
            left = total - position
            count = next((size for size in QUERY_LENGTHS if size >= left), QUERY_LENGTHS[-1])
            begin = position // count * count
            end = min(begin + count, total)
            found.append(self._call(begin, end, count)[position - begin : end - begin])
            position = end
        return torch.cat(found)

    def _call(self, begin: int, end: int, count: int) -> Tensor:
        """Feed positions `begin` to `end`, exclusive, padded to `count`: logits float32 [count, vocab_size]."""
        length = next(each for each in self._ladder if each >= begin + count)
        if length > self._length:
            self._length = length
            for name in _STATES:
                self._runtime.grow_state(name, 4, length)
        ids = np.zeros((1, count), np.int32)
        ids[0, : end - begin] = self._text[begin:end].numpy()
        table = {EMBEDDING_TABLE: EMBEDDING_TABLE}
        gathered = self._runtime.call(gather_name(count), {TOKEN_IDS: ids}, kept=table)[GATHERED]
        mask = np.full((1, self._length, 1, count), _FORBIDDEN, np.float16)
        for query in range(end - begin):
            mask[0, : begin + query + 1, 0, query] = 0
        inputs = {
            TRANSFORMER_INPUT: gathered,
            POSITION_IDS: np.arange(begin, begin + count, dtype=np.uint16)[None],
            IN_STEP: np.array([begin], np.int32),
            CAUSAL_MASK: mask,
        }
        name = step_name(self.step, self._length, count)
        logits = self._runtime.call(name, inputs, states={state: state for state in _STATES})[STATIC_LOGITS]
        if self.step != EXTEND:
            return torch.full((count, self._vocab_size), torch.nan)
        return torch.from_numpy(logits[0, 0]).float()
