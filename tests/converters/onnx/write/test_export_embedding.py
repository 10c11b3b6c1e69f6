"""Embedding models as ONNX folders: any batch, any padding, in every profile; what other programs look for."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("onnxruntime")

from converters.onnx.read.artifact import open_artifact
from converters.onnx.read.embedding_artifact import OnnxEmbeddingArtifact, embedding_feeds
from converters.onnx.write.bundle import write_bundle
from converters.onnx.write.export_plan import plan_onnx
from edkm_export.artifact.protocol import DamagedArtifact
from edkm_export.errors import ConversionError
from edkm_export.reference.hard_model import load_hard_embedding_model
from tests.helpers.embedding_models import CASES, palettized, texts_of, write_folder

PROFILES = ("exact", "low-memory", "fast", "fast standard")
QUICK = [("minilm", "exact"), ("embeddinggemma", "low-memory"), ("qwen3", "fast"), ("modernbert", "exact")]


def export(folder, out, profile="exact", **options):
    """The checkpoint, and what was read back."""
    runtime, *standard = profile.split()
    grid = "int8" if runtime == "fast" else "float16"
    checkpoint = palettized(folder, lut_dtype=grid)
    plan = plan_onnx(checkpoint, runtime=runtime, standard_ops=bool(standard), **options)
    out.mkdir()
    write_bundle(checkpoint, plan, out)
    assert (out / "onnx/model.onnx_data").stat().st_size == plan.weights_size_bytes
    artifact = open_artifact(out)
    assert isinstance(artifact, OnnxEmbeddingArtifact), artifact.reason
    return checkpoint, artifact


def compare(folder, out, profile, dtype):
    checkpoint, artifact = export(folder, out, profile, dtype=dtype)
    found = artifact.palettized()
    assert all(tensor.same_bits(found[name]) for name, tensor in checkpoint.palettized.items())
    assert checkpoint.dense.keys() <= artifact.dense().keys()
    model = load_hard_embedding_model(checkpoint)
    texts = texts_of(folder, model)
    with torch.no_grad():
        expected = torch.cat(
            [
                model(text.ids[None], torch.ones_like(text.ids[None]), prompt_length=text.prompt)
                for text in texts
            ]
        )
    assert {"execution-onnxruntime-padded", "execution-onnxruntime-plain"} <= {
        encoding.id for encoding in artifact.encodings
    }
    for encoding in artifact.encodings:
        vectors = encoding.encode(texts)
        least = float(torch.cosine_similarity(vectors, expected).min())
        assert least >= encoding.threshold.cosine, (encoding.id, least)
        if encoding.threshold.words == "float32":  # sums in another order
            torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("case", "profile"), QUICK)
def test_every_encoding_equals_pytorch(tmp_path, case, profile):
    compare(write_folder(CASES[case], tmp_path / "model"), tmp_path / "out", profile, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("case", CASES)
def test_all_cases_and_profiles(tmp_path, case, profile, dtype):
    compare(write_folder(CASES[case], tmp_path / "model"), tmp_path / "out", profile, dtype)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return write_folder(CASES["e5"], folder / "model"), *export(folder / "model", folder / "out")


def test_names_and_open_sizes(bert):
    """As optimum's models for feature extraction and transformers.js have them."""
    graph = bert[2].graph.graph
    assert {name: value.shape for name, value in graph.inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), ("batch_size", "sequence_length")
    )
    assert {name: value.shape for name, value in graph.outputs.items()} == {
        "last_hidden_state": ("batch_size", "sequence_length", 48),
        "sentence_embedding": ("batch_size", 48),
    }


def test_token_vectors_are_those_of_transformers(bert):
    """transformers.js' feature-extraction pipeline pools these itself."""
    folder, checkpoint, artifact = bert
    model = load_hard_embedding_model(checkpoint)
    feeds = embedding_feeds(artifact.graph.graph, texts_of(folder, model))
    feeds["token_type_ids"][0, 2:5] = 1
    found = torch.from_numpy(artifact.graph.runtime().run(feeds)["last_hidden_state"])
    given = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.no_grad():
        expected = model.model(**given).last_hidden_state
    shown = given["attention_mask"].bool()
    torch.testing.assert_close(found[shown], expected[shown], atol=1e-4, rtol=1e-4)


def test_files(bert):
    root = bert[2].path
    config = json.loads((root / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}
    assert not (root / "genai_config.json").exists() and not (root / "generation_config.json").exists()
    assert json.loads((root / "tokenizer_config.json").read_text())["model_max_length"] == 48
    told = json.loads((root / "metadata.json").read_text())
    assert told["embedding"]["prompts"] == {"query": "query: ", "passage": "passage: "}


def test_sentence_transformers_reads_its_files(bert, tmp_path):
    """What it would pool and how; with the weights in a graph, its own reader of our files is ours."""
    from edkm_export.reference.sentence_files import read_sentence_files

    _, checkpoint, artifact = bert
    found = read_sentence_files(artifact.path, "out", hidden_size=48, positions=64)
    assert found.settings == checkpoint.embedding and not found.not_understood


def test_modules_are_left_out_where_their_weights_are_in_the_graph(tmp_path):
    folder = write_folder(CASES["dense tanh"], tmp_path / "model")
    _, artifact = export(folder, tmp_path / "out")
    assert not (artifact.path / "modules.json").exists()
    assert (artifact.path / "config_sentence_transformers.json").exists()


def test_tables_of_positions_and_types_may_be_palettized(tmp_path):
    """They are followed by their own ids through the graph."""
    from edkm_export.palettization import palettize_model
    from edkm_export.recipe import Recipe, Rule
    from edkm_export.reference.source import Source, load_embedding_model

    folder = write_folder(CASES["minilm"], tmp_path / "model")
    plain = palettized(folder)
    model = load_embedding_model(Source.parse(folder))
    parts = palettize_model(model, Recipe(rules=(Rule(match="*", bits=4, group_size=0),)), source="model")
    checkpoint = type(plain)(
        plain.config, parts.palettized, parts.dense, parts.tied, plain.tokenizer, embedding=plain.embedding
    )
    assert "model.embeddings.position_embeddings.weight" in checkpoint.palettized
    (tmp_path / "out").mkdir()
    write_bundle(checkpoint, plan_onnx(checkpoint), tmp_path / "out")
    found = open_artifact(tmp_path / "out").palettized()
    assert all(tensor.same_bits(found[name]) for name, tensor in checkpoint.palettized.items())


def test_long_texts_are_run_in_several_batches(bert, monkeypatch):
    from converters.onnx.read import embedding_artifact

    _, checkpoint, artifact = bert
    texts = texts_of(artifact.path, load_hard_embedding_model(checkpoint))
    (padded,) = (each for each in artifact.encodings if each.id == "execution-onnxruntime-padded")
    whole = padded.encode(texts)
    sizes = []
    plain = embedding_artifact.embedding_feeds

    def counted(graph, batch, **options):
        sizes.append(len(batch))
        return plain(graph, batch, **options)

    monkeypatch.setattr(embedding_artifact, "embedding_feeds", counted)
    monkeypatch.setattr(embedding_artifact, "_BATCH_TOKENS", 60)
    torch.testing.assert_close(padded.encode(texts), whole, atol=1e-5, rtol=0)
    assert len(sizes) > 1 and sum(sizes) == len(texts)


def test_context_is_the_longest_text(bert):
    assert bert[2].context == 48
    assert plan_onnx(bert[1], context=64).context == 64
    with pytest.raises(ConversionError, match="--context-length 65 is outside 2 to 64"):
        plan_onnx(bert[1], context=65)


def test_interfaces_are_not_mixed_up(bert, tiny_checkpoint):
    with pytest.raises(ConversionError, match="holds an embedding model, which gives no logits"):
        plan_onnx(bert[1], interface="decoder")
    with pytest.raises(ConversionError, match="holds a language model; --interface embedding"):
        plan_onnx(tiny_checkpoint, interface="embedding")
    with pytest.raises(ConversionError, match="--interface 'vectors' is unknown"):
        plan_onnx(bert[1], interface="vectors")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("interface", "vectors", "interface is 'vectors'"),
        ("interface", "decoder", "expected a decoder"),
        ("embedding", "{}", "embedding: pooling"),
        ("embedding", "no", "embedding is no JSON"),
    ],
)
def test_damaged_descriptions(bert, tmp_path, key, value, words):
    import shutil

    import onnx

    out = shutil.copytree(bert[2].path, tmp_path / "out")
    model = onnx.load_model(out / "onnx/model.onnx", load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == f"edkm_export.{key}":
            entry.value = value
    onnx.save_model(model, out / "onnx/model.onnx")
    found = open_artifact(out)
    assert isinstance(found, DamagedArtifact) and words in found.reason
