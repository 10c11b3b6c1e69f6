"""Masks, position tables, and tracing with shapes that change afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.context import MASKED, Context, causal_mask, sliding_mask
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.positions import PositionTables
from edkm_export.errors import ConversionError
from tests.helpers.odd_families import EXPORTED, build, checkpoint_of


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_masks_position_by_position(window):
    queries, keys = (
        torch.tensor([[4, 5, 6], [0, 1, 2]]),
        torch.tensor([list(range(7)), [*range(3), 9, 9, 9, 9]]),
    )
    causal = causal_mask(queries, keys)
    sliding = sliding_mask(causal, queries, keys, window)
    assert causal.shape == sliding.shape == (2, 1, 3, 7)
    for row in range(2):
        for query in range(3):
            for key in range(7):
                distance = int(queries[row, query] - keys[row, key])
                assert causal[row, 0, query, key] == (0 if distance >= 0 else MASKED)
                assert sliding[row, 0, query, key] == (0 if 0 <= distance < window else MASKED)


def test_window_on_a_mask_that_reaches_the_end_of_float16():
    positions = torch.arange(4)[None]
    mask = torch.full((1, 1, 4, 4), -65504.0).triu(1).half()
    sliding = sliding_mask(mask, positions, positions, 2)
    assert sliding.dtype == torch.float16 and sliding.isfinite().all()
    assert ((sliding == 0) == (torch.ones(4, 4).tril() - torch.ones(4, 4).tril(-2)).bool()).all()


def test_equal_tables_are_held_once():
    for case, tables in (("mistral", 1), ("gemma2", 1), ("gemma3", 2), ("gpt2", 0)):
        model = build(case)
        config = build_decoder(checkpoint_of(model)).config
        found = PositionTables(config, model.config.to_dict(), 16)
        assert len(list(found.buffers())) == 2 * tables
        kinds = found(torch.tensor([[3, 1]])).keys()
        assert kinds == (set(config.layer_kinds) if tables else set())


def test_layers_of_one_kind_need_one_table():
    model = build("gemma3")  # a sliding layer, then a full one
    config = build_decoder(checkpoint_of(model)).config
    for layers, kind in ((slice(0, 1), SLIDING), (slice(1, 2), FULL)):
        found = PositionTables(config, model.config.to_dict(), 16, layers)
        assert len(list(found.buffers())) == 2 and found(torch.tensor([[3]])).keys() == {kind}


def test_learned_positions_end():
    model = build("gpt2")
    config = build_decoder(checkpoint_of(model)).config
    with pytest.raises(
        ConversionError, match="65 positions .* has learned 64; use --sequence-length 64 or less"
    ):
        PositionTables(config, model.config.to_dict(), 65)


class Traced(nn.Module):
    """All that changes from call to call is an input."""

    def __init__(self, decoder: Decoder, tables: PositionTables) -> None:
        super().__init__()
        self.decoder, self.tables = decoder, tables

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        masks = {FULL: causal_mask(position_ids, position_ids)}
        window = self.decoder.config.sliding_window
        if window is not None:
            masks[SLIDING] = sliding_mask(masks[FULL], position_ids, position_ids, window)
        return self.decoder(input_ids, Context(position_ids, self.tables(position_ids), masks))


@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_trace_bakes_no_shape_in(case):
    model = build(case)
    decoder = build_decoder(checkpoint_of(model))
    module = Traced(decoder, PositionTables(decoder.config, model.config.to_dict(), 32)).eval()
    trace = torch.jit.trace(module, (torch.full((1, 4), 5), torch.arange(4)[None]), check_trace=False)
    for batch, length in ((1, 1), (1, 9), (3, 13)):
        tokens = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))
        found = trace(tokens, torch.arange(length).expand(batch, -1))
        # float32 on both sides, sums in another order
        torch.testing.assert_close(found, model(tokens, use_cache=False).logits, rtol=0, atol=1e-4)
