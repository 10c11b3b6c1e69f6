"""The contract of Apple's dynamic engine: one function for prompts and single tokens of any length.

From `swift/Sources/CoreAILanguageModels` and `python/src/coreai_models/export/macos.py` of apple/coreai-models, commit
86b363d: inputs `input_ids` and `position_ids` in this order, both int32, the latter with all positions so far; states
`keyCache` and `valueCache` that grow; first output `logits` in float16. Layers without attention have states that do
not, `convStates` and `recurrentStates`, as in `python/src/coreai_models/models/macos/qwen3_5.py` there, commit a3cfebc;
only layers of the kind have a place in a state. Ours of recurrences are float32.

Keys and values of int8, with `keyScales` and `valueScales`, leave that contract: `zeroFillNDArray` of its
`Handlers/StateHandler+NDArray.swift`, commit 34ab73d, ends the program at a state that is not a float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
from converters.coreai.write.cache_ops import FunctionalCache
from converters.coreai.write.delta_loop import loop_rules
from converters.coreai.write.traced_function import TracedFunction
from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig
from edkm_export.decoder.context import Context, causal_mask, sliding_mask
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.states import Columns, KeysValues, layer_states, layers_with
from edkm_export.kv_cache import FLOAT, INT8, KVCache

__all__ = ["DynamicDecoder", "dynamic_function"]

_GROWING = {FLOAT: (KEY_CACHE, VALUE_CACHE), INT8: (KEY_CACHE, VALUE_CACHE, KEY_SCALES, VALUE_SCALES)}
_FIXED = (COLUMN_STATES, RECURRENT_STATES)
_SHORTEST_CACHE = 64  # traced lower bound of a state; the engine begins with 256


class DynamicDecoder(nn.Module):
    """A decoder with its cache; the lengths of the inputs tell where the new tokens stand.

    Args:
        decoder: the model.
        hf_config: Hugging Face configuration, for the position tables.
        context: positions that the tables hold.

    Raises:
        ConversionError: see `PositionTables`.
    """

    def __init__(self, decoder: Decoder, hf_config: dict[str, Any], context: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.tables = PositionTables(decoder.config, hf_config, context)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keys: Tensor,
        values: Tensor,
        columns: Tensor | None = None,
        matrices: Tensor | None = None,
    ) -> Tensor:
        """Logits of the new tokens; the states are updated in place.

        Args:
            input_ids: int32 [1, new].
            position_ids: int32 [1, total], 0 to total - 1; the new tokens are the last of them.
            keys: [layers, 1, kv_heads, length, head_dim].
            values: as the keys.
            columns: [layers, 1, width, channels], of layers with a convolution.
            matrices: float32 [layers, 1, heads, key_dim, value_dim], of layers with a recurrence.

        Returns:
            [1, new, vocab_size].
        """
        given = zip((*_GROWING[FLOAT], *_FIXED), (keys, values, columns, matrices), strict=True)
        states = {name: state for name, state in given if state is not None}
        return self._run(input_ids, position_ids, states, keys.dtype)

    def _run(
        self, input_ids: Tensor, position_ids: Tensor, states: dict[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Logits, with states by name; `dtype` of activations."""
        new, total = input_ids.shape[-1], position_ids.shape[-1]
        begin = total - new
        positions = position_ids.narrow(-1, begin, new)
        config = self.decoder.config
        causal = causal_mask(positions, position_ids)
        masks = {FULL: causal}
        if config.sliding_window is not None and SLIDING in config.layer_kinds:
            masks[SLIDING] = sliding_mask(causal, positions, position_ids, config.sliding_window)
        masks = {kind: mask.to(dtype) for kind, mask in masks.items() if kind in config.layer_kinds}
        context = Context(positions, self.tables(positions), masks)
        cache = FunctionalCache(config, states, begin, total, visible=total)
        logits = self.decoder(input_ids, context, cache)
        for name, state in states.items():
            state.copy_(cache.states[name])
        return logits  # type: ignore[no-any-return]


class Int8DynamicDecoder(DynamicDecoder):
    """The same, with keys and values as int8; see `kv_cache`."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor,
        value_scales: Tensor,
        columns: Tensor | None = None,
        matrices: Tensor | None = None,
    ) -> Tensor:
        """As `DynamicDecoder.forward`; `keys` and `values` are codes, their scales [layers, 1, kv_heads, length, 1]."""
        parts = (keys, values, key_scales, value_scales, columns, matrices)
        given = zip((*_GROWING[INT8], *_FIXED), parts, strict=True)
        states = {name: state for name, state in given if state is not None}
        return self._run(input_ids, position_ids, states, key_scales.dtype)


def dynamic_function(
    decoder: Decoder,
    hf_config: dict[str, Any],
    context: int,
    dtype: torch.dtype,
    kv_cache: KVCache = FLOAT,
) -> TracedFunction:
    """The function `main`, to be traced.

    Args:
        decoder: with its weights, named or real.
        hf_config: Hugging Face configuration.
        context: most positions.
        dtype: of activations and states.
        kv_cache: how keys and values are held.
    """
    loop_rules(decoder)
    states = _states(decoder.config, min(context, 2 * _SHORTEST_CACHE), dtype, kv_cache)
    new, total = min(16, context - 2), min(24, context - 1)
    dim = torch.export.Dim
    shortest, growing = min(_SHORTEST_CACHE, context - 1), _GROWING[kv_cache]
    module = Int8DynamicDecoder if kv_cache == INT8 else DynamicDecoder
    return TracedFunction(
        name=MAIN,
        module=module(decoder, hf_config, context).to(dtype).eval(),
        examples=(
            torch.zeros(1, new, dtype=torch.int32),
            torch.arange(total, dtype=torch.int32)[None],
            *states.values(),
        ),
        dynamic_shapes=(
            {1: dim("new", min=1, max=context)},
            {1: dim("total", min=1, max=context)},
            *({3: dim(name, min=shortest, max=context)} for name in growing),
            *[None] * (len(states) - len(growing)),
        ),
        inputs=(INPUT_IDS, POSITION_IDS),
        states=tuple(states),
        outputs=(LOGITS,),
    )


def _states(config: DecoderConfig, length: int, dtype: torch.dtype, kv_cache: KVCache) -> dict[str, Tensor]:
    """Zeros by name, for tracing."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        for state in layer_states(config, layer):
            count = len(layers_with(config, type(state)))
            if isinstance(state, KeysValues):
                shape: tuple[int, ...] = (count, 1, state.heads, length, state.head_dim)
                # heads of several sizes share a state, which is as large as the largest
                shape = tuple(map(max, shapes.get(KEY_CACHE, shape), shape))
                shapes |= {KEY_CACHE: shape, VALUE_CACHE: shape}
                if kv_cache == INT8:
                    shapes |= {KEY_SCALES: (*shape[:-1], 1), VALUE_SCALES: (*shape[:-1], 1)}
            elif isinstance(state, Columns):
                shapes[COLUMN_STATES] = (count, 1, state.width, state.channels)
            else:
                shapes[RECURRENT_STATES] = (count, 1, state.heads, state.key_dim, state.value_dim)
    dtypes = {RECURRENT_STATES: torch.float32}
    if kv_cache == INT8:
        dtypes |= {KEY_CACHE: torch.int8, VALUE_CACHE: torch.int8}
    return {
        name: torch.zeros(shapes[name], dtype=dtypes.get(name, dtype))
        for name in (*_GROWING[kv_cache], *_FIXED)
        if name in shapes
    }
