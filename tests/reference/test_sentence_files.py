"""The files of sentence-transformers: what is used, what has no effect, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edkm_export.embedding_settings import DenseSettings, EmbeddingSettings
from edkm_export.errors import InputError, SourceError
from edkm_export.reference.source import (
    Source,
    account,
    embedding_settings,
    load_embedding_model,
    load_model,
)
from tests.helpers.embedding_models import CASES, edited, write_folder

TANH = "torch.nn.modules.activation.Tanh"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return {
        case: write_folder(CASES[case], tmp_path_factory.mktemp("originals") / "model")
        for case in ("minilm", "embeddinggemma", "dense tanh")
    }


@pytest.fixture
def folder_of(originals, tmp_path):
    def copy(case: str) -> Path:
        return Path(shutil.copytree(originals[case], tmp_path / "model"))

    return copy


def refused(folder: Path) -> dict[str, str]:
    """What is not understood of a folder, which is then refused by name."""
    found = dict(account(Source.parse(folder)).not_understood)
    if found:
        name = next(iter(found))
        with pytest.raises(SourceError) as caught:
            load_embedding_model(Source.parse(folder))
        assert name in str(caught.value) and "would be another model" in str(caught.value)
    return found


def modules(folder: Path) -> list[dict]:
    return json.loads((folder / "modules.json").read_text())


def write_modules(folder: Path, listed: list[dict]) -> None:
    (folder / "modules.json").write_text(json.dumps(listed))


def test_settings(originals):
    found = embedding_settings(Source.parse(originals["embeddinggemma"]))
    assert found == EmbeddingSettings(
        pooling="mean",
        dense=(
            DenseSettings(in_features=48, out_features=80, bias=False, activation="identity"),
            DenseSettings(in_features=80, out_features=40, bias=False, activation="identity"),
        ),
        normalize=True,
        max_tokens=48,
        prompts={"query": "task: search | query: ", "document": "title: none | text: "},
    )
    assert found.dimension(48) == 40
    assert found.words() == "mean, 2 dense layers, normalized"


def test_a_language_model_has_none(tiny_llama):
    assert embedding_settings(Source.parse(tiny_llama)) is None


def test_an_embedding_model_is_no_language_model(originals):
    with pytest.raises(InputError, match="is an embedding model .* takes language models"):
        load_model(Source.parse(originals["minilm"]))


def test_files_of_a_newer_release(folder_of):
    """Names of modules and fields as sentence-transformers 6 writes them."""
    folder = folder_of("minilm")
    base = "sentence_transformers.base.modules"
    write_modules(
        folder,
        [
            {"idx": 0, "name": "0", "path": "", "type": f"{base}.transformer.Transformer"},
            {
                "idx": 1,
                "name": "1",
                "path": "1_Pooling",
                "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            },
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{base}.normalize.Normalize"},
        ],
    )
    forms = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    texts = {"transformer_task": "feature-extraction", "modality_config": forms}
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({**texts, "module_output_name": "token_embeddings"})
    )
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"embedding_dimension": 48, "pooling_mode": "lasttoken", "include_prompt": True})
    )
    (folder / "2_Normalize").mkdir()
    (folder / "2_Normalize/config.json").write_text(
        json.dumps({"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"})
    )
    edited(folder, "config_sentence_transformers.json", model_type="SentenceTransformer")
    edited(folder, "tokenizer_config.json", model_max_length=31)
    found = embedding_settings(Source.parse(folder))
    assert (found.pooling, found.max_tokens, found.normalize) == ("lasttoken", 31, True)


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 64), (1000, 64), (20, 20)], ids=["of the model", "too long", "shorter"]
)
def test_longest_text(folder_of, limit, expected):
    folder = folder_of("minilm")
    edited(folder, "sentence_bert_config.json", max_seq_length=limit)
    edited(folder, "tokenizer_config.json", model_max_length=10**30)
    assert embedding_settings(Source.parse(folder)).max_tokens == expected


def test_pooling_flags_that_say_nothing_mean_the_mean(folder_of):
    folder = folder_of("minilm")
    edited(folder, "1_Pooling/config.json", pooling_mode_mean_tokens=False)
    assert embedding_settings(Source.parse(folder)).pooling == "mean"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling_mode_cls_token": True}, "joins several poolings (cls, mean)"),
        ({"pooling_mode": ["mean", "max"]}, "joins several poolings (mean, max)"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "is 'max'"),
        ({"pooling_mode": "weightedmean"}, "is 'weightedmean'"),
        ({"pooling_mode": 3}, "is 3"),
        ({"word_embedding_dimension": 40}, "is 40, and only 48"),
        ({"include_prompt": "no"}, "is 'no'"),
        ({"temperature": 2}, "a field that is not known, 2"),
    ],
)
def test_pooling_that_is_refused(folder_of, changes, words):
    folder = folder_of("minilm")
    edited(folder, "1_Pooling/config.json", **changes)
    found = refused(folder)
    assert any(name.startswith("1_Pooling/config.json: ") and words in why for name, why in found.items()), (
        found
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_residual": True}, "use_residual"),
        ({"activation_function": "my_code.Swish"}, "activation_function"),
        ({"activation_function": "torch.nn.modules.activation.Softplus"}, "Softplus"),
        ({"in_features": 24}, "what comes before has 48 channels"),
        ({"out_features": 0}, "out_features"),
        ({"bias": 1}, "is 1"),
        ({"module_input_name": "token_embeddings"}, "token_embeddings"),
        ({"out_features": 25}, "and its config.json gives [25, 48]"),
        ({"bias": False}, "linear.bias"),
    ],
)
def test_dense_layers_that_are_refused(folder_of, changes, words):
    folder = folder_of("dense tanh")
    edited(folder, "2_Dense/config.json", **changes)
    found = refused(folder)
    assert any("2_Dense" in name and words in f"{name}: {why}" for name, why in found.items()), found


def test_weights_of_a_dense_layer_must_be_there(folder_of):
    folder = folder_of("dense tanh")
    weights = load_file(folder / "2_Dense/model.safetensors")
    save_file({"linear.bias": weights["linear.bias"]}, folder / "2_Dense/model.safetensors")
    assert "is missing" in refused(folder)["2_Dense/linear.weight"]


def test_pickled_dense_layers_are_not_read(folder_of):
    folder = folder_of("dense tanh")
    (folder / "2_Dense/model.safetensors").unlink()
    (folder / "2_Dense/pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="its weights are pickles"):
        account(Source.parse(folder))


def _insert(place: int, kind: str, path: str = "9_Extra"):
    def change(listed):
        listed.insert(place, {"idx": 9, "name": "9", "path": path, "type": kind})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_insert(2, "sentence_transformers.models.LSTM"), "understood are Transformer, Pooling"),
        (_insert(2, "custom_code.MyModule"), "of other Python code, which is not run"),
        (_insert(1, "sentence_transformers.models.Normalize"), "the order is Transformer, Pooling"),
        (_insert(2, "sentence_transformers.models.Pooling", "1_Pooling"), "the order is"),
        (lambda listed: listed.pop(0), "the order is"),
        (lambda listed: listed.__delitem__(slice(1, None)), "has no Pooling module"),
        (lambda listed: listed[0].update(path="0_Transformer"), "in a folder of its own"),
        (lambda listed: listed[1].update(kwargs=["task"]), "is ['task']"),
    ],
)
def test_modules_that_are_refused(folder_of, change, words):
    folder = folder_of("minilm")
    listed = modules(folder)
    change(listed)
    write_modules(folder, listed)
    found = refused(folder)
    assert any(words in why for why in found.values()), found


def test_dropout_has_no_effect(folder_of):
    folder = folder_of("minilm")
    listed = modules(folder)
    listed.insert(2, {"idx": 9, "path": "2_Dropout", "type": "sentence_transformers.models.Dropout"})
    write_modules(folder, listed)
    assert "modules.json: 2_Dropout" in account(Source.parse(folder)).without_effect
    assert not refused(folder)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("{", "modules.json cannot be read: it is no JSON"),
        ("{}", "modules.json is no JSON list"),
        ('[{"path": "../other", "type": "sentence_transformers.models.Transformer"}]', "plain path"),
        ('[{"path": "/etc", "type": "sentence_transformers.models.Transformer"}]', "plain path"),
        ('[{"path": "", "type": 3}]', "plain path"),
        ("[3]", "plain path"),
    ],
)
def test_damaged_modules(folder_of, contents, words):
    folder = folder_of("minilm")
    (folder / "modules.json").write_text(contents)
    with pytest.raises(InputError, match=words):
        embedding_settings(Source.parse(folder))


def test_a_file_that_modules_name_is_missing(folder_of):
    folder = folder_of("minilm")
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(InputError, match=r"1_Pooling/config.json, which modules.json names"):
        embedding_settings(Source.parse(folder))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config_sentence_transformers.json", {"default_prompt_name": "title"}, "default_prompt is 'title'"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
        ("config_sentence_transformers.json", {"surprise": 1}, "surprise"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length"),
        ("sentence_bert_config.json", {"do_lower_case": "yes"}, "do_lower_case"),
        ("sentence_bert_config.json", {"query_length": 32}, "query_length"),
        (
            "config.json",
            {"architectures": ["BertForSequenceClassification"]},
            "BertForSequenceClassification",
        ),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantized weights"),
    ],
)
def test_other_fields_that_are_refused(folder_of, file, changes, words):
    folder = folder_of("minilm")
    edited(folder, file, **changes)
    found = refused(folder)
    assert any(words in f"{name}: {why}" for name, why in found.items()), found


def test_heads_and_old_constants_have_no_effect(folder_of):
    """BERT as a masked language model saved it: its prefix, its head, its pooler, the numbers of its positions."""
    folder = folder_of("minilm")
    plain = load_embedding_model(Source.parse(folder)).state_dict()
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    extra = {
        "bert.pooler.dense.weight": torch.ones(48, 48),
        "cls.predictions.bias": torch.ones(300),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    save_file({**weights, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    edited(folder, "config.json", architectures=["BertForMaskedLM"])
    found = account(Source.parse(folder))
    assert not found.not_understood and extra.keys() <= found.without_effect.keys()
    loaded = load_embedding_model(Source.parse(folder)).state_dict()
    assert loaded.keys() == plain.keys() and all(loaded[name].equal(plain[name]) for name in plain)


def test_a_tensor_that_belongs_nowhere(folder_of):
    folder = folder_of("minilm")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "adapter.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    assert "adapter.weight" in refused(folder)


def test_weights_of_dense_layers_are_part_of_the_provenance(originals):
    digests = Source.parse(originals["embeddinggemma"]).provenance()["sha256"]
    assert digests.keys() == {
        "model.safetensors",
        "2_Dense/model.safetensors",
        "3_Dense/model.safetensors",
    }
