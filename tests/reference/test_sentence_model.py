"""The reference of embedding models against arithmetic that is written out, and against sentence-transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edkm_export.reference.sentence_model import SentenceTokenizer, padded
from edkm_export.reference.source import Source, load_embedding_model, load_tokenizer
from tests.helpers.embedding_models import CASES, SENTENCES, write_folder

_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": np.tanh,
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


def written_out(model, ids, prompt):
    """One text without padding: transformers' own token vectors, then loops over numbers. float64 [dimension]."""
    settings = model.settings
    with torch.no_grad():
        vectors = model.model(input_ids=ids[None]).last_hidden_state[0].double().numpy()
    kept = vectors if settings.include_prompt else vectors[prompt:]
    if settings.pooling == "cls":
        pooled = kept[0]
    elif settings.pooling == "lasttoken":
        pooled = kept[-1]
    else:
        pooled = sum(kept) / len(kept)
    for layer, kind in zip(model.dense, settings.dense, strict=True):
        product = [
            sum(w * x for w, x in zip(row, pooled, strict=True)) for row in layer.weight.double().tolist()
        ]
        pooled = np.array(product) + (layer.bias.double().numpy() if layer.bias is not None else 0)
        pooled = _ACTIVATIONS[kind.activation](pooled)
    return pooled / math.sqrt(sum(x * x for x in pooled)) if settings.normalize else pooled


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """{case: (folder, model, tokenizer)}, made when it is asked for."""
    made = {}

    def load(name):
        if name not in made:
            folder = write_folder(CASES[name], tmp_path_factory.mktemp("embedding") / "model")
            model = load_embedding_model(Source.parse(folder), torch.float32)
            tokenizer = SentenceTokenizer(load_tokenizer(Source.parse(folder)), model.settings)
            made[name] = folder, model, tokenizer
        return made[name]

    return load


@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_equals_each_text_alone(loaded, case):
    """Mixed lengths, one of a single letter, padded on either side where positions are not learned."""
    _, model, tokenizer = loaded(case)
    encoded = [tokenizer.encode(text, "query") for text in SENTENCES]
    expected = np.stack([written_out(model, *each) for each in encoded])
    for left in (False, True) if CASES[case].config != "BertConfig" else (False,):
        ids, mask = padded([ids for ids, _ in encoded], left=left)
        with torch.no_grad():
            found = model(ids, mask, prompt_length=encoded[0][1]).double().numpy()
        np.testing.assert_allclose(found, expected, atol=3e-6)  # float32 sums


@pytest.mark.parametrize("case", ["minilm", "qwen3"])
def test_one_token(loaded, case):
    _, model, _ = loaded(case)
    ids = torch.tensor([[7]])
    with torch.no_grad():
        found = model(ids, torch.ones_like(ids))[0].double().numpy()
    np.testing.assert_allclose(found, written_out(model, ids[0], 0), atol=3e-6)


def test_texts_are_cut(loaded):
    """To max_seq_length, with the special token at the end; or to less where it is asked for."""
    folder, model, tokenizer = loaded("minilm")
    long = "a very long text " * 20
    ids, _ = tokenizer.encode(long)
    assert len(ids) == 48 == model.settings.max_tokens and int(ids[-1]) == 299
    short = SentenceTokenizer(load_tokenizer(Source.parse(folder)), model.settings, 16)
    assert len(short.encode(long)[0]) == 16


def test_prompts_stand_before_the_text(loaded):
    _, _, tokenizer = loaded("e5")
    assert tokenizer.encode("a boat", "query")[0].equal(tokenizer.encode("query: a boat")[0])
    assert tokenizer.encode("a boat", "document")[0].equal(tokenizer.encode("passage: a boat")[0])
    # without the special token at its end
    assert tokenizer.encode("a boat", "query")[1] == len(tokenizer.encode("query: ")[0]) - 1


def test_lower_case(loaded):
    """sentence-transformers lowers texts itself where its file asks for it."""
    folder, model, plain = loaded("minilm")
    settings = model.settings.model_copy(update={"lower_case": True, "prompts": {"query": "Search: "}})
    lowered = SentenceTokenizer(load_tokenizer(Source.parse(folder)), settings)
    assert lowered.encode("A Boat", "query")[0].equal(plain.encode("search: a boat")[0])
    assert not plain.encode("A Boat")[0].equal(plain.encode("a boat")[0])


def test_windows_are_framed_as_texts(loaded):
    _, _, tokenizer = loaded("minilm")
    framed = tokenizer.framed(torch.arange(100).view(2, 50))
    assert framed.shape == (2, 48)
    assert framed[1].tolist() == [298, *range(50, 96), 299]


@pytest.mark.parametrize("case", CASES)
def test_against_sentence_transformers(loaded, case):
    """The package itself, where it is installed."""
    package = pytest.importorskip("sentence_transformers")
    folder, model, tokenizer = loaded(case)
    theirs = package.SentenceTransformer(str(folder))
    for name, role in (("query", "query"), (None, None)):
        name = name if name in model.settings.prompts else None
        encoded = [tokenizer.encode(text, role if name else None) for text in SENTENCES]
        if name is None and model.settings.default_prompt is not None:
            encoded = [tokenizer.encode(text, "document") for text in SENTENCES]
        ids, mask = padded([ids for ids, _ in encoded], left=CASES[case].left)
        with torch.no_grad():
            found = model(ids, mask, prompt_length=encoded[0][1]).numpy()
        np.testing.assert_allclose(found, theirs.encode(list(SENTENCES), prompt_name=name), atol=3e-6)
