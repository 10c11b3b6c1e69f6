"""The contract of Apple's static engine, which runs on the Neural Engine: functions of fixed shapes.

From `CoreAIStaticShapeEngine.swift`, `python/src/coreai_models/export/ios.py` and `models/base.py` of
apple/coreai-models, commit 86b363d. `load_embeddings` gives the table of embeddings, `gather_embeddings_<tokens>` looks
tokens up, `extend_<context>_<tokens>` gives `out_logits`, `prompt_opt_<context>_<tokens>` only fills the cache. A call
begins at a multiple of its number of tokens; what was fed before is fed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from converters.coreai.format import (
    CAUSAL_MASK,
    EMBEDDING_TABLE,
    EXTEND,
    GATHER_EMBEDDINGS,
    GATHERED,
    IN_STEP,
    LOAD_EMBEDDINGS,
    POSITION_IDS,
    PROMPT,
    QUERY_LENGTHS,
    STATIC_KEY_CACHE,
    STATIC_LOGITS,
    STATIC_VALUE_CACHE,
    TOKEN_IDS,
    TRANSFORMER_INPUT,
    context_ladder,
)
from converters.coreai.write.cache_ops import ColumnCache
from converters.coreai.write.traced_function import TracedFunction
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.context import MASKED, Context, sliding_mask
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.positions import PositionTables

__all__ = ["static_functions"]


class _Table(nn.Module):
    """The table of embeddings, [vocab_size, 1, hidden]."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self) -> Tensor:
        weight = getattr(self.embedding, "weight_of", None)
        table: Tensor = self.embedding.weight if weight is None else weight()  # type: ignore[assignment]
        return table.unsqueeze(1)


class _Gather(nn.Module):
    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Tokens int32 [1, new], table [vocab_size, 1, hidden] -> [1, new, 1, hidden]."""
        return table[tokens]


class _Step(nn.Module):
    """A decoder from gathered embeddings on.

    Args:
        decoder: the model.
        tables: positions.
        prompt: only fill the cache.
    """

    def __init__(self, decoder: Decoder, tables: PositionTables, *, prompt: bool) -> None:
        super().__init__()
        self.decoder, self.tables, self.prompt = decoder, tables, prompt

    def forward(
        self, embedded: Tensor, position_ids: Tensor, step: Tensor, mask: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Logits [1, 1, new, vocab_size]; for a prompt one number that depends on both states.

        Args:
            embedded: [1, new, 1, hidden].
            position_ids: uint16 [1, new].
            step: int32 [1], position of the first token.
            mask: additive, [1, length, 1, new].
            keys: [layers, 1, kv_heads * head_dim, 1, length].
            values: as the keys.
        """
        config, stack = self.decoder.config, self.decoder.stack
        positions = position_ids.to(torch.int32)
        full = mask.permute(0, 2, 3, 1).clamp(
            min=MASKED
        )  # the engine's -40000 plus a score could leave float16
        masks = {FULL: full}
        if config.sliding_window is not None and SLIDING in config.layer_kinds:
            every = torch.arange(keys.shape[4], dtype=torch.int32)[None]
            masks[SLIDING] = sliding_mask(full, positions, every, config.sliding_window)
        context = Context(positions, self.tables(positions), masks)
        x = embedded.squeeze(2)
        scale: Any = stack.embedding_scale
        if scale != 1:
            x = x * scale
        if config.names.positions is not None:
            x = x + stack.get_submodule(config.names.positions)(positions)
        cache = ColumnCache(keys, values, config.num_kv_heads, step)
        x = stack.through(x, context, cache)  # type: ignore[operator]
        keys.copy_(cache.keys)
        values.copy_(cache.values)
        if self.prompt:
            return keys[0, 0, 0, 0, 0] + values[0, 0, 0, 0, 0]
        x = stack.get_submodule(config.names.final_norm)(x)
        return self.decoder.head(x).unsqueeze(1)


def static_functions(
    decoder: Decoder, hf_config: dict[str, Any], context: int, dtype: torch.dtype
) -> list[TracedFunction]:
    """The functions of the static engine, to be traced.

    Args:
        decoder: with its weights, named or real.
        hf_config: Hugging Face configuration.
        context: of the longest cache, one of `context_ladder`.
        dtype: of activations and states.
    """
    config = decoder.config
    width, new = config.num_kv_heads * config.head_dim, QUERY_LENGTHS[0]
    tables = PositionTables(config, hf_config, context).to(dtype)
    table = torch.zeros(config.vocab_size, 1, config.hidden_size, dtype=dtype)
    state = torch.zeros(config.num_layers, 1, width, 1, context, dtype=dtype)
    length, tokens = torch.export.Dim("length", max=context), torch.export.Dim("tokens", max=context)
    shapes = {
        f'"{cached}_{count}"': {
            TRANSFORMER_INPUT: (1, count, 1, config.hidden_size),
            POSITION_IDS: (1, count),
            CAUSAL_MASK: (1, cached, 1, count),
            STATIC_KEY_CACHE: (config.num_layers, 1, width, 1, cached),
            STATIC_VALUE_CACHE: (config.num_layers, 1, width, 1, cached),
        }
        for cached in context_ladder(context)
        for count in QUERY_LENGTHS
    }
    steps = [
        TracedFunction(
            name=name,
            module=_Step(decoder, tables, prompt=name == PROMPT).eval(),
            examples=(
                torch.zeros(1, new, 1, config.hidden_size, dtype=dtype),
                torch.arange(new).to(torch.uint16)[None],
                torch.zeros(1, dtype=torch.int32),
                torch.zeros(1, context, 1, new, dtype=dtype),
                state.clone(),
                state.clone(),
            ),
            dynamic_shapes=({1: tokens}, {1: tokens}, None, {1: length, 3: tokens}, {4: length}, {4: length}),
            inputs=(TRANSFORMER_INPUT, POSITION_IDS, IN_STEP, CAUSAL_MASK),
            states=(STATIC_KEY_CACHE, STATIC_VALUE_CACHE),
            outputs=(STATIC_LOGITS,),
            static_shapes=shapes,
        )
        for name in (EXTEND, PROMPT)
    ]
    load = TracedFunction(
        name=LOAD_EMBEDDINGS,
        module=_Table(decoder.embedding).eval(),
        examples=(),
        dynamic_shapes=None,
        inputs=(),
        states=(),
        outputs=(EMBEDDING_TABLE,),
    )
    gather = TracedFunction(
        name=GATHER_EMBEDDINGS,
        module=_Gather().eval(),
        examples=(torch.zeros(1, new, dtype=torch.int32), table),
        dynamic_shapes=({1: tokens}, None),
        inputs=(TOKEN_IDS, EMBEDDING_TABLE),
        states=(),
        outputs=(GATHERED,),
        static_shapes={f'"{count}"': {TOKEN_IDS: (1, count)} for count in QUERY_LENGTHS},
    )
    return [load, gather, *steps]
