"""Embedding models as they are exported, against transformers' own with sentence-transformers' arithmetic."""

from __future__ import annotations

import pytest
import torch

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import decoder_config
from edkm_export.decoder.embedding.embedding_model import (
    embedding_config,
    empty_embedding_model,
    visible_masks,
)
from edkm_export.decoder.embedding.token_pooling import pool
from edkm_export.decoder.norms import LayerNorm, UnitNorm
from edkm_export.decoder.positions import PositionTables
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.errors import ConversionError
from edkm_export.reference.hard_model import load_hard_embedding_model
from edkm_export.reference.sentence_model import padded
from tests.helpers import odd_families
from tests.helpers.embedding_models import CASES, palettized, texts_of, write_folder


def run(checkpoint: Checkpoint, ids, mask, dtype=torch.float32):
    """Our own model: [texts, dimension]."""
    model = empty_embedding_model(checkpoint)
    model.load_state_dict(checkpoint.state_dict(dtype), assign=True)
    model = model.to(dtype)
    positions = torch.arange(ids.shape[1])[None]
    tables = PositionTables(model.config, checkpoint.config, ids.shape[1])(positions)
    rotary = {kind: (cos.to(dtype), sin.to(dtype)) for kind, (cos, sin) in tables.items()}
    visible = {kind: each.to(dtype) for kind, each in visible_masks(model.config, positions).items()}
    types = torch.zeros_like(ids) if model.config.token_types else None
    with torch.no_grad():
        vectors, found = model(ids, mask, types, positions, rotary, visible)
    assert vectors.shape == (*ids.shape, model.config.hidden_size)
    return found.float()


@pytest.mark.parametrize("case", CASES)
def test_against_transformers(tmp_path, case):
    """A batch of mixed lengths, padded on the right, and on the left as transformers' own positions go."""
    folder = write_folder(CASES[case], tmp_path / "model")
    checkpoint = palettized(folder)
    model = load_hard_embedding_model(checkpoint)
    texts = texts_of(folder, model)
    for left in (False, True):
        ids, mask = padded([text.ids for text in texts], left=left)
        with torch.no_grad():
            expected = model(ids, mask, prompt_length=texts[0].prompt)
        marked = mask.clone()
        for row in range(len(texts)):
            first = int(mask[row].argmax())
            marked[row, first : first + texts[row].prompt] = 2
        torch.testing.assert_close(run(checkpoint, ids, marked), expected, atol=1e-5, rtol=0)


def of_family(case: str, pooling: str) -> Checkpoint:
    """The stack of a language model as an embedding model."""
    model = odd_families.build(case)
    dense = {f"model.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    settings = EmbeddingSettings(pooling=pooling, max_tokens=24)
    return Checkpoint(config=model.config.to_dict(), palettized={}, dense=dense, embedding=settings)


@pytest.mark.parametrize(
    "case",
    [case for case, (kind, _) in odd_families.CASES.items() if kind not in ("gpt2", "lfm2", "qwen3_5_text")],
)
def test_every_family(case):
    """Causal stacks, as E5-Mistral and Qwen3-Embedding are."""
    checkpoint = of_family(case, "lasttoken")
    model = load_hard_embedding_model(checkpoint)
    torch.manual_seed(1)
    texts = [torch.randint(3, 90, (length,)) for length in (19, 1, 7)]
    for left in (False, True):
        ids, mask = padded(texts, left=left)
        with torch.no_grad():
            expected = model(ids, mask)
        torch.testing.assert_close(run(checkpoint, ids, mask), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["lfm2", "qwen3_5"])
def test_states_would_take_in_padding(case):
    with pytest.raises(ConversionError, match="embedding models are made of attention alone"):
        empty_embedding_model(of_family(case, "mean"))


@pytest.mark.parametrize(
    ("case", "channel"), [("minilm", 30.0), ("modernbert", 3e4), ("embeddinggemma", 3e4)]
)
def test_outliers_in_float16(tmp_path, case, channel):
    """A channel of the residual stream as large as real models have it: tens in BERT, whose norms follow each sum,
    tens of thousands in ModernBERT, beyond float16 in Gemma 3, where a norm multiplies by it."""
    folder = write_folder(CASES[case], tmp_path / "model")
    checkpoint = palettized(folder)
    dense = checkpoint.dense
    if case == "minilm":
        dense["model.encoder.layer.0.output.dense.bias"][5] = channel
    elif case == "modernbert":
        dense["model.embeddings.norm.weight"][5] = channel / 2
    else:
        dense["model.layers.0.post_feedforward_layernorm.weight"][5] = channel
    model = load_hard_embedding_model(checkpoint)
    texts = texts_of(folder, model)
    ids, mask = padded([text.ids for text in texts])
    with torch.no_grad():
        expected = model(ids, mask)
    found = run(checkpoint, ids, mask, torch.float16)
    assert float(torch.cosine_similarity(found, expected).min()) > 0.999


@pytest.mark.parametrize("kind", ["mean", "cls", "lasttoken"])
def test_pooling_counts_what_the_mask_says(kind):
    """Against a loop; a text without tokens gives zeros, not NaN."""
    torch.manual_seed(0)
    vectors = torch.randn(4, 6, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0] * 6])
    found = pool(kind, vectors, mask, torch.arange(6)[None])[:, 0]
    for row in range(4):
        kept = [vectors[row, place] for place in range(6) if mask[row, place]]
        whole = {"mean": lambda kept: sum(kept) / len(kept), "cls": lambda kept: kept[0]}
        expected = whole.get(kind, lambda kept: kept[-1])(kept) if kept else torch.zeros(3)
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("size", [1e-3, 1.0, 6e4])
def test_unit_norm_in_float16(size):
    torch.manual_seed(0)
    x = torch.randn(5, 256).clamp(-1, 1) * size
    found = UnitNorm()(x.half()).double()
    torch.testing.assert_close(
        found, torch.nn.functional.normalize(x.half().double(), dim=-1), atol=2e-3, rtol=0
    )
    assert not UnitNorm()(torch.zeros(1, 4)).any()


def test_layer_norm_without_bias():
    torch.manual_seed(0)
    norm = LayerNorm(24, 1e-5, bias=False)
    norm.weight.data.normal_()
    x = torch.randn(3, 24) * 50
    expected = torch.nn.functional.layer_norm(x, (24,), norm.weight, None, 1e-5)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "reach"), [(7, 3), (8, 4), (1, 0)])
def test_gemma_sees_half_a_window_on_each_side(window, reach):
    settings = {**CASES["embeddinggemma"].settings, "sliding_window": window, "model_type": "gemma3_text"}
    config = embedding_config(settings, "model.pt")
    mask = visible_masks(config, torch.arange(12)[None])["sliding"][0, 0]
    seen = [[abs(query - key) <= reach for key in range(12)] for query in range(12)]
    assert (mask == 0).tolist() == seen


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "xlm-roberta"}, "model type 'xlm-roberta' cannot be exported yet"),
        ({"model_type": "gpt2"}, "model type 'gpt2'"),
        ({"model_type": "bert", "hidden_size": 50, "num_attention_heads": 4}, "4 heads do not divide"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder True is not supported"),
        ({"model_type": "bert", "hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ({"model_type": "modernbert", "local_attention": 0}, "local_attention"),
    ],
)
def test_refused_configurations(settings, words):
    with pytest.raises(ConversionError, match=words):
        embedding_config(settings, "model.pt")


def test_a_model_that_looks_both_ways_continues_no_text():
    settings = {**CASES["embeddinggemma"].settings, "model_type": "gemma3_text"}
    with pytest.raises(ConversionError, match="use_bidirectional_attention True is not supported"):
        decoder_config(settings, "model.pt")
