"""Embedding models as Core ML packages, run by our interpreter in float32 and rounded to float16."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("coremltools")

from converters.coreml.read.artifact import open_artifact
from converters.coreml.read.embedding_artifact import CoreMLEmbeddingArtifact
from converters.coreml.read.session import CoreMLSession
from converters.coreml.write.bundle import write_bundle
from converters.coreml.write.export_plan import plan_export
from edkm_export.artifact.encodings import TextTokens
from edkm_export.errors import ConversionError, InputError, PackageError
from edkm_export.reference.hard_model import load_hard_embedding_model
from tests.helpers.embedding_models import CASES, palettized, texts_of, write_folder

LENGTH = 24


def export(folder, out, group_size=16, **options):
    checkpoint = palettized(folder, group_size=group_size)
    plan = plan_export(checkpoint, sequence_length=LENGTH, **options)
    out.mkdir()
    artifact = open_artifact(write_bundle(checkpoint, plan, out, "model"))
    assert isinstance(artifact, CoreMLEmbeddingArtifact), artifact.reason
    # what the rung of the size allows; the numbers of the positions may be narrower than predicted
    assert artifact.weights_size_bytes() == pytest.approx(plan.weights_size_bytes, rel=0.01)
    return checkpoint, artifact


def compare(case, tmp_path):
    folder = write_folder(CASES[case], tmp_path / "model")
    checkpoint, artifact = export(folder, tmp_path / "out")
    found = artifact.palettized()
    assert all(tensor.same_bits(found[name]) for name, tensor in checkpoint.palettized.items())
    model = load_hard_embedding_model(checkpoint)
    texts = texts_of(folder, model, limit=LENGTH)
    with torch.no_grad():
        expected = torch.cat(
            [
                model(text.ids[None], torch.ones_like(text.ids[None]), prompt_length=text.prompt)
                for text in texts
            ]
        )
    for encoding in artifact.encodings:
        if encoding.encode is not None:
            least = float(torch.cosine_similarity(encoding.encode(texts), expected).min())
            assert least >= encoding.threshold.cosine, (encoding.id, least)


@pytest.mark.parametrize("case", ["embeddinggemma", "without prompt"])
def test_every_encoding_equals_pytorch(tmp_path, case):
    compare(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_cases(tmp_path, case):
    compare(case, tmp_path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    write_folder(CASES["minilm"], folder / "model")
    return export(folder / "model", folder / "out", group_size=0, target="iOS17")


def test_interface(bert):
    _, artifact = bert
    package = artifact.path.parent
    told = json.loads((package / "metadata.json").read_text())
    assert (told["interface"], told["target"], told["sequence_length"]) == ("embedding", "iOS17", LENGTH)
    assert told["packages"][0]["output"] == "sentence_embedding" and told["embedding"]["pooling"] == "mean"
    assert not (package / "generation_config.json").exists()
    assert (package / "1_Pooling/config.json").is_file()


def test_texts_of_other_lengths(bert):
    _, artifact = bert
    encode = artifact.encodings[0].encode
    assert encode([TextTokens(torch.tensor([5]))]).shape == (1, 48)
    with pytest.raises(InputError, match="a text has 25 tokens, more than its 24 positions"):
        encode([TextTokens(torch.arange(25))])


def test_it_continues_no_text(bert):
    with pytest.raises(PackageError, match="gives embeddings and continues no text"):
        CoreMLSession.open(bert[1].path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interface": "logits"}, "holds an embedding model, which gives no logits"),
        ({"interface": "swift-transformers"}, "holds an embedding model"),
        ({"sequence_length": 65}, "--sequence-length 65 is outside 2 to 64"),
        ({"chunks": 2}, "--chunks 2 is for --interface neural-engine"),
        ({"target": "iOS17", "interface": "vectors"}, "--interface 'vectors' is unknown"),
    ],
)
def test_refused(bert, options, words):
    with pytest.raises(ConversionError, match=words):
        plan_export(bert[0], **options)


def test_a_language_model_makes_no_embeddings(tiny_checkpoint):
    with pytest.raises(ConversionError, match="holds a language model; --interface embedding"):
        plan_export(tiny_checkpoint, interface="embedding")


def test_usual_length_is_that_of_the_texts(bert):
    assert plan_export(bert[0]).context == 48
