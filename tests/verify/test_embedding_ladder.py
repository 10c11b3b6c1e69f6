"""The ladder of embedding models: sound ones pass, planted faults are found."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")

from converters.onnx.read.artifact import open_artifact
from converters.onnx.write.bundle import write_bundle
from converters.onnx.write.export_plan import plan_onnx
from edkm_export.api.climbing import climb, verification_inputs
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import InputError
from edkm_export.palette import PalettizedTensor
from edkm_export.reference.source import Source
from edkm_export.verify.embedding_metrics import compare_embeddings
from edkm_export.verify.report import Report, Verdict
from edkm_export.verify.sentences import read_sentences
from edkm_export.verify.write import markdown
from edkm_export.verify.write import quality as card_words
from tests.helpers.embedding_models import CASES, palettized, write_folder

OPTIONS = {
    "memory_bytes": None,
    "text": None,
    "tokens": 600,
    "original": None,
    "run": None,
    "max_perplexity_ratio": "preset",
    "prompts": (),
    "localize": False,
    "minutes": None,
    "command": (),
}


def verify(checkpoint: Checkpoint, path: Path, **options) -> Report:
    inputs = verification_inputs(checkpoint, **{**OPTIONS, **options})
    return climb(checkpoint, path, inputs)


def rung(report, name):
    return next(each for each in report.rungs if each.id == name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, checkpoint, exported folder) of a BERT with prompts at 8 bits."""
    place = tmp_path_factory.mktemp("ladder")
    folder = write_folder(CASES["e5"], place / "model")
    checkpoint = palettized(folder, bits=8)
    (place / "out").mkdir()
    write_bundle(checkpoint, plan_onnx(checkpoint), place / "out")
    return folder, checkpoint, place / "out"


@pytest.fixture(scope="module")
def report(made):
    return verify(made[1], made[2], original=Source.parse(made[0]))


def test_a_sound_export_passes(report):
    assert (report.faithful_export, report.quality) == (Verdict.PASS, Verdict.WITHIN)
    assert [each.id for each in report.rungs] == [
        "source",
        "palettization",
        "bytes",
        "size",
        "execution-onnxruntime",
        "execution-onnxruntime-padded",
        "execution-onnxruntime-plain",
        "execution-reference",
    ]
    assert {each.verdict for each in report.rungs} == {Verdict.PASS, Verdict.WITHIN}
    near = rung(report, "palettization").measures
    assert near["cosine_min"] > 0.99 and near["rank_agreement"] > 0.9 and near["cosine_limit"] == 0.995
    assert report.tensors[0].output_snr_db is not None and report.layer_errors


def test_words(report):
    """No word of a language model in what a reader sees first."""
    text = markdown(report)
    head = text.split("## Ladder")[0]
    assert "cosine" in head and "rank agreement" in head and "embeddings within rounding" in head
    assert "perplexity" not in head and "logits" not in head and "top-1" not in head
    assert "perplexity" not in card_words(report)
    assert "cosine" in repr(report) and "rank" not in report.html().split("<body")[0]
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_prompts_are_applied(report, made):
    """Six hundred tokens of texts with their prompts: fewer texts than without."""
    used = report.provenance["evaluation"]
    bare = dataclasses.replace(made[1], embedding=made[1].embedding.model_copy(update={"prompts": {}}))
    without = verify(bare, made[2]).provenance["evaluation"]
    assert used["texts"] < without["texts"] and used["queries"] >= 3


def test_without_the_original_quality_is_not_run(made):
    found = verify(made[1], made[2])
    assert (found.faithful_export, found.quality) == (Verdict.PASS, Verdict.NOT_RUN)
    assert "not compared with" in markdown(found)


def test_no_limit(made):
    found = verify(made[1], made[2], original=Source.parse(made[0]), max_perplexity_ratio=None)
    assert found.quality is Verdict.REPORTED


def test_a_changed_weight_fails(made):
    """Another value in one LUT of the checkpoint: the artifact is another model."""
    checkpoint = made[1]
    name = "model.encoder.layer.1.output.dense.weight"
    tensor = checkpoint.palettized[name]
    other = PalettizedTensor.from_indices(
        name, tensor.lut.flip(2).contiguous(), tensor.unpack_indices(), shape=tensor.shape
    )
    changed = dataclasses.replace(checkpoint, palettized={**checkpoint.palettized, name: other})
    found = verify(changed, made[2])
    assert found.faithful_export is Verdict.FAIL
    assert {each.id for each in found.rungs if each.verdict is Verdict.FAIL} >= {
        "bytes",
        "execution-onnxruntime",
        "execution-onnxruntime-padded",
    }


@pytest.mark.parametrize(
    "change", [{"pooling": "cls"}, {"normalize": False}], ids=["other pooling", "not normalized"]
)
def test_other_settings_fail_every_execution(made, change):
    """Bits are the same, what is computed with them is not."""
    settings = made[1].embedding.model_copy(update=change)
    found = verify(dataclasses.replace(made[1], embedding=settings), made[2])
    assert rung(found, "bytes").verdict is Verdict.PASS and found.faithful_export is Verdict.FAIL
    assert all(each.verdict is Verdict.FAIL for each in found.rungs if each.id.startswith("execution-"))


def test_a_mask_that_is_ignored_fails_the_padded_batch(made, tmp_path):
    """A graph whose attention sees padding: one text alone does not show it."""
    import shutil

    import onnx

    out = shutil.copytree(made[2], tmp_path / "out")
    model = onnx.load_model(out / "onnx/model.onnx", load_external_data=False)
    (minimum,) = (node for node in model.graph.node if node.op_type == "Min")
    minimum.input[1] = minimum.input[0]
    onnx.save_model(model, out / "onnx/model.onnx")
    found = verify(made[1], out)
    assert rung(found, "execution-onnxruntime").verdict is Verdict.PASS
    assert rung(found, "execution-onnxruntime-padded").verdict is Verdict.FAIL
    assert found.faithful_export is Verdict.FAIL


def test_a_damaged_folder_fails(made, tmp_path):
    (tmp_path / "out/onnx").mkdir(parents=True)
    (tmp_path / "out/onnx/model.onnx").write_bytes(b"no model")
    found = verify(made[1], tmp_path / "out")
    assert found.faithful_export is Verdict.FAIL and rung(found, "bytes").verdict is Verdict.FAIL


def test_a_decoder_is_another_model(made, onnx_folder):
    found = verify(made[1], onnx_folder("exact"))
    assert found.faithful_export is Verdict.FAIL and "gives logits" in rung(found, "bytes").detail


def test_an_embedding_model_is_no_decoder(made, tiny_checkpoint, held_out):
    inputs = verification_inputs(tiny_checkpoint, **{**OPTIONS, "text": (held_out, "words"), "tokens": 64})
    found = climb(tiny_checkpoint, made[2], inputs)
    assert found.faithful_export is Verdict.FAIL and "holds an embedding model" in rung(found, "bytes").detail


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": ("Once",)}, "a prompt to continue"),
        ({"localize": True}, "--localize is for language models"),
        ({"max_perplexity_ratio": 1.2}, "a limit of the perplexity"),
        ({"run": "run"}, "a training run"),
        ({"text": (torch.arange(99), "ids")}, "ids: are token ids"),
        ({"text": ("one\ntwo\n\nthree", "file")}, "file: has 3 lines with text"),
    ],
)
def test_what_only_a_language_model_has_is_refused(made, options, words):
    with pytest.raises(InputError, match=words):
        verification_inputs(made[1], **{**OPTIONS, **options})


def test_another_original_is_refused(made, tmp_path):
    other = write_folder(CASES["minilm"], tmp_path / "other")
    with pytest.raises(InputError, match="pooling, dense layers or prompts are not those"):
        verify(made[1], made[2], original=Source.parse(other))


def test_texts_of_the_users_own(made):
    text = "query\tA boat?\ndocument\tA boat at sea.\ndocument\tBread.\ndocument\tTulips.\nJust a line.\n"
    found = verify(made[1], made[2], text=(text, "mine"))
    used = found.provenance["evaluation"]
    assert (used["text"], used["texts"], used["queries"]) == ("mine", 5, 2)


def test_roles():
    found = read_sentences("query\ta\nDocument\tb\ndocument\tc\td\n\n e \n", "file")
    assert [(each.text, each.role) for each in found] == [
        ("a", "query"),
        ("Document\tb", None),
        ("c\td", "document"),
        ("e", None),
    ]


def test_time_that_is_used_up(made, monkeypatch):
    from edkm_export.verify import embedding_ladder

    monkeypatch.setattr(embedding_ladder.Budget, "is_over", True)
    found = verify(made[1], made[2], minutes=1e-6)
    assert found.faithful_export is Verdict.NOT_RUN and found.time_budget.cut


# Measures


def test_closeness_counts_pairs():
    """Against counts by hand: three documents, one query."""
    reference = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.5], [0, 1]])
    same = compare_embeddings(reference, reference * 2, [0], [1, 2, 3], tie=0)
    assert (same.pairs, same.rank_agreement, same.same_nearest) == (3, 1.0, 1.0)
    assert same.cosine_min == pytest.approx(1) and same.length_error == pytest.approx(1)
    turned = reference.clone()
    turned[[1, 2]] = reference[[2, 1]]
    found = compare_embeddings(reference, turned, [0], [1, 2, 3], tie=0)
    assert found.rank_agreement == pytest.approx(2 / 3) and found.same_nearest == 0 and found.near_ties == 0
    assert compare_embeddings(reference, turned, [0], [1, 2, 3], tie=0.5).settled_agreement == 1


def test_a_vector_that_is_not_finite_is_infinitely_far():
    reference = torch.eye(4)
    broken = reference.clone()
    broken[2, 2] = math.nan
    found = compare_embeddings(reference, broken, [0], [1, 2, 3], tie=1)
    assert found.cosine_min == -math.inf and found.length_error == math.inf and found.settled_agreement < 1


def test_an_artifact_can_be_opened_by_its_graph(made):
    assert repr(open_artifact(made[2] / "onnx/model.onnx")).startswith("OnnxEmbeddingArtifact(out, exact")
