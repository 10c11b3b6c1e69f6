"""Per-layer embeddings and the scalars of layers, through a step of training and into a checkpoint."""

from __future__ import annotations

import pytest
import torch

from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import attach, insert_clusters, to_checkpoint
from tests.helpers.odd_families import build

TABLE = "model.embed_tokens_per_layer"
TOKENS = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", ["gemma3n", "gemma4"])
def test_a_step_and_its_checkpoint(case):
    model = build(case).train()
    recipe = uniform_recipe(4, 16, fit_groups=True)
    insert_clusters(model, recipe, method=ClusterMethod())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    before = model.get_submodule(TABLE).clusters.weight.detach().clone()
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    after = model.get_submodule(TABLE).clusters.weight.detach()
    moved = (before - after).abs().sum(-1).nonzero().flatten().tolist()
    assert set(moved) == set(TOKENS[0, :-1].tolist())  # what the last token gives is not part of the loss
    made = to_checkpoint(model, recipe)
    assert made.palettized[f"{TABLE}.weight"].n_bits == 4
    assert ("model.layers.0.layer_scalar" in made.dense) == (case == "gemma4")
    with torch.no_grad():
        trained = model.eval()(TOKENS, use_cache=False).logits
        hard = load_hard_model(made)(TOKENS, use_cache=False).logits
        exported = WholeSequence(build_decoder(made), made.config, TOKENS.shape[1])(TOKENS)
    torch.testing.assert_close(hard, trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported, hard, rtol=0, atol=1e-4)
