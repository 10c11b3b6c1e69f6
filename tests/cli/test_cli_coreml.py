from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from converters.coreml import load_package
from edkm_export import checkpoint
from edkm_export.checkpoint import Checkpoint
from edkm_export.verify.report import Report
from tests.helpers.palettes import random_palette
from tests.helpers.snapshots import snapshot

pytest.importorskip("coremltools")

pytestmark = pytest.mark.usefixtures("work")

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(small_export, work) -> Path:
    """A good checkpoint, to be spoiled."""
    return Path(shutil.copy(small_export.model, work / "model.pt"))


# What it makes


def test_whole_job(edkm, tiny_export, held_out, work):
    """Trained model, default output name, verification against the original, files of the folder."""
    shutil.copy(tiny_export.model, "tiny.pt")
    Path("text").write_text(held_out, encoding="utf-8")
    text = Path("text").absolute()
    result = edkm(
        "coreml", Path("tiny.pt").absolute(), "--sequence-length", 48, "--tokens", 96, "--text", text
    )
    assert result.status == 0, result.err
    assert "PASS" in result.out and "tiny-coreml: drag tiny.mlpackage into Xcode" in result.out
    folder = work / "tiny-coreml"
    names = {path.name for path in folder.iterdir()}
    assert {
        "tiny.mlpackage",
        "tokenizer.json",
        "config.json",
        "metadata.json",
        "README.md",
        "report.json",
        "report.md",
    } <= names
    report = Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
    assert report.artifact == "tiny.mlpackage" and report.bit_exact_tensors == 29
    assert report.perplexities.keys() >= {"original", "hard PyTorch"}
    assert "NOT RUN" in (folder / "report.md").read_text(encoding="utf-8") or os.uname().sysname == "Darwin"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["package"] == "tiny.mlpackage" and metadata["sequence_length"] == 48
    assert metadata["interface"] == "swift-transformers"
    function = load_package(folder / "tiny.mlpackage").functions["main"]
    assert function.inputs["inputIds"].ranges == ((1, 1), (1, 48))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Faithful export: **PASS**" in card and "Quality: **WITHIN**" in card
    assert "LanguageModel.loadCompiled" in card
    for name in ("README.md", "report.json", "report.md", "report.html", "metadata.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w./])/(home|root|tmp|work|Users)/", text), name
        assert str(Path.cwd()) not in text and str(tiny_export.model.parent) not in text
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "coreml"
    assert metadata["checkpoint"]["file"] == "tiny.pt" and str(work) not in card
    told = edkm("push", "tiny-coreml", "some-one/tiny", "--dry-run")
    assert told.status == 0 and "tiny.mlpackage/Data/com.apple.CoreML/weights/weight.bin" in told.out, (
        told.err
    )
    rungs = {rung.id: rung.verdict.value for rung in report.rungs}
    assert rungs["prefill-decode"] == rungs["continuation"] == rungs["continuation-rounded"] == "PASS", rungs
    assert not any(path.name.startswith(".") for path in work.iterdir())


def test_without_verification(edkm, model, work):
    options = ("--interface", "logits", "--sequence-length", 16, "--no-verify")
    result = edkm("coreml", model, "-o", "bundle", *options)
    assert result.status == 0 and "NOT VERIFIED" in result.out
    assert not list(Path("bundle").glob("report.*"))
    found = load_package("bundle/model.mlpackage").palettized()
    for name, tensor in checkpoint.load(model).palettized.items():
        assert tensor.same_bits(found[name])


def test_overwrite_replaces_a_folder_of_ours(edkm, model, small_export):
    shutil.copytree(small_export.bundle, "bundle")
    Path("bundle/leftover").write_text("of the old one")
    options = ("--interface", "logits", "--sequence-length", 16, "--no-verify", "--overwrite")
    result = edkm("coreml", model, "-o", "bundle", *options)
    assert result.status == 0 and not Path("bundle/leftover").exists()
    assert load_package("bundle/model.mlpackage").functions["main"].inputs["input_ids"].type.shape == (1, 16)


@pytest.fixture
def ready_made(tiny_export, monkeypatch) -> None:
    """Take the finished package of the session instead of converting again."""
    from converters.coreml.write import bundle

    def write_bundle(_checkpoint: Any, _plan: Any, folder: Path, _name: str) -> Path:
        shutil.copytree(tiny_export.bundle, folder, dirs_exist_ok=True)
        return folder / tiny_export.package.name

    monkeypatch.setattr(bundle, "write_bundle", write_bundle)


@pytest.mark.usefixtures("ready_made")
def test_failed_verification_keeps_the_folder_and_exits_with_1(edkm, tiny_export, held_out):
    Path("text").write_text(held_out, encoding="utf-8")
    result = edkm(
        "coreml", tiny_export.model, "-o", "bundle", "--sequence-length", 64, "--tokens", 64, "--text", "text",
        "--max-perplexity-ratio", 0.5,
    )  # fmt: skip
    assert result.status == 1 and "BEYOND" in result.out
    assert "**Quality: BEYOND.**" in Path("bundle/report.md").read_text(encoding="utf-8")


def test_shortest_sequence(edkm, tiny_export, held_out):
    """A sound model must not fail because its windows are short; with one position there is nothing to predict."""
    Path("text").write_text(held_out, encoding="utf-8")
    options = ("--interface", "logits", "--sequence-length", 2, "--tokens", 64, "--text", "text")
    result = edkm("coreml", tiny_export.model, "-o", "bundle", *options)
    assert result.status == 0, result.out


# Bad input: status 2, one line that names what is wrong, nothing left behind


def refused(edkm: Callable[..., Any], work: Path, *arguments: object) -> str:
    before = snapshot(work)
    result = edkm("coreml", *arguments)
    assert result.status == 2, result.out + result.err
    assert snapshot(work) == before
    return result.message


def test_missing_checkpoint(edkm, work):
    assert refused(edkm, work, "gone.pt").startswith("gone.pt: no such file; make one with")


def test_folder_instead_of_a_checkpoint(edkm, work, small_folder):
    message = refused(edkm, work, small_folder, "-o", "bundle")
    assert message.startswith(f"{small_folder}: is a folder; to palettize it run")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_unreadable_checkpoint(edkm, work, model):
    model.chmod(0)
    assert "no permission to read it" in refused(edkm, work, model)


@pytest.mark.parametrize("kept", [0, 0.3, 0.99])
def test_truncated_checkpoint(edkm, work, model, kept):
    content = model.read_bytes()
    model.write_bytes(content[: int(kept * len(content))])
    assert refused(edkm, work, model).startswith(f"{model}: is truncated or not an edkm-export checkpoint")


class Touch:
    """Unpickling an instance creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("archive", [True, False])
def test_pickle_with_code(edkm, work, model, tmp_path, archive):
    payload = {"format": "edkm-export", "config": Touch(tmp_path / "proof")}
    if archive:
        torch.save(payload, model)
    else:
        model.write_bytes(pickle.dumps(payload))
    assert refused(edkm, work, model).startswith(f"{model}: ")
    assert not (tmp_path / "proof").exists()


def test_unknown_version(edkm, work, model):
    contents = torch.load(model, weights_only=True)
    contents["format_version"] = 7
    torch.save(contents, model)
    assert refused(edkm, work, model).startswith(f"{model}: format version is 7, this release reads 1")


def spoil(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        contents = torch.load(path, weights_only=True)
        change(contents["palettized"][UP])
        torch.save(contents, path)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts["lut"].view(-1).__setitem__(3, float("nan")), "LUT holds NaN or infinity"),
        (lambda parts: parts["lut"].view(-1).__setitem__(3, float("inf")), "LUT holds NaN or infinity"),
        (
            lambda parts: parts.update(lut=parts["lut"][:, :, :8].contiguous()),
            "LUT has shape [3, 1, 8, 1], expected [groups_out, groups_in, 16, dim] at 4 bits: "
            "with fewer entries an index could point beyond the LUT",
        ),
        (lambda parts: parts.update(n_bits=5), "n_bits is 5"),
        (lambda parts: parts.update(n_bits=7), "n_bits is 7"),
        (lambda parts: parts["indices"].__setitem__(0, 77), "the sha256 of its 'palettized' part is"),
    ],
    ids=["nan", "infinity", "index beyond the LUT", "5 bits", "7 bits", "flipped"],
)
def test_damaged_palette(edkm, work, model, change, message):
    spoil(change)(model)
    found = refused(edkm, work, model)
    assert found.startswith(f"{model}: ") and message in found


def edited(path: Path, change: Callable[[Checkpoint], object]) -> None:
    """Write a checkpoint that is valid in itself, but is changed, in place or by what `change` returns."""
    made = checkpoint.load(path)
    made = dataclasses.replace(
        made, palettized=dict(made.palettized), dense=dict(made.dense), tied=dict(made.tied)
    )
    other = change(made)
    checkpoint.save(other if isinstance(other, Checkpoint) else made, path, overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.dense.pop("model.norm.weight"), "parameter model.norm.weight is missing"),
        (lambda made: made.palettized.pop(UP), f"parameter {UP} is missing"),
        (lambda made: made.tied.clear(), "parameter lm_head.weight is missing"),
        (
            lambda made: made.dense.update({"model.bias": torch.ones(2)}),
            "parameter model.bias is not part of the model",
        ),
        (
            lambda made: made.palettized.update({UP: random_palette((48, 16), 4, name=UP)}),
            f"parameter {UP} has shape [48, 16], the model needs [48, 32]",
        ),
    ],
    ids=["missing", "missing palette", "untied", "extra", "misshapen"],
)
def test_parameters_that_do_not_fit(edkm, work, model, change, message):
    edited(model, change)
    assert refused(edkm, work, model).startswith(f"{model}: {message}")


def configured(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    def change(made: Checkpoint) -> Checkpoint:
        config = {key: value for key, value in {**made.config, **changes}.items() if value != "remove"}
        return dataclasses.replace(made, config=config)

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model type 'mamba' cannot be exported yet; supported are "),
        ({"model_type": "remove"}, "model type None cannot be exported yet"),
        ({"num_hidden_layers": "remove"}, "its configuration lacks 'num_hidden_layers'"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3 layers, but its weights are of 2"),
        ({"num_hidden_layers": "two"}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"max_position_embeddings": "many"}, ""),
        ({"max_position_embeddings": None}, ""),
        ({"rms_norm_eps": "small"}, ""),
        ({"rope_parameters": {"rope_type": "spiral"}}, "RoPE scaling 'spiral' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": ["linear"]}, ""),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, ""),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_configuration_that_cannot_be_exported(edkm, work, model, changes, message):
    edited(model, configured(**changes))
    found = refused(edkm, work, model, "--no-verify", "--sequence-length", 16)
    assert message in found
    if message and "rope_parameters" not in changes:
        assert found.startswith(f"{model}: ")


@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
def test_target_that_cannot_hold_grouped_luts(edkm, work, model, target):
    assert refused(edkm, work, model, "--interface", "logits", "--target", target) == (
        f"{model} needs iOS18: 10 weights have grouped LUTs, which {target} cannot hold. "
        "Use --target iOS18, or palettize with --group-size 0."
    )


@pytest.mark.parametrize("interface", ["swift-transformers", "neural-engine"])
def test_target_without_states(edkm, work, model, interface):
    message = refused(edkm, work, model, "--target", "iOS17", "--interface", interface)
    assert (
        "keeps its cache in a state, which iOS17 does not have" in message and "--interface logits" in message
    )


def test_target_that_cannot_hold_3_bits(edkm, work, small_folder):
    assert edkm("palettize", small_folder, "--bits", 3, "--group-size", 0).status == 0
    message = refused(edkm, work, "model.pt", "--interface", "logits", "--target", "iOS17")
    assert (
        "14 weights have 3-bit indices, which iOS17 cannot hold. Use --target iOS18, or palettize with"
        in message
    )


def test_unknown_target(edkm, work, model):
    assert refused(edkm, work, model, "--target", "iOS15") == (
        "target 'iOS15' is unknown; use one of iOS16, iOS17, iOS18, or macOS13, macOS14 or macOS15, which hold the "
        "same."
    )


@pytest.mark.parametrize("target", ["ios18", "iOS-18", "IOS 18", "macOS15", "ios_18.2"])
def test_target_in_any_usual_spelling(edkm, model, target):
    told = edkm("coreml", model, "--dry-run", "--interface", "logits", "--target", target)
    assert told.status == 0 and re.search(r"target\W+iOS18\b", told.out)


@pytest.mark.parametrize("length", [1, 0, -5, 129])
def test_sequence_length(edkm, work, model, length):
    message = refused(edkm, work, model, "--interface", "logits", "--sequence-length", length)
    assert f"--sequence-length {length} is outside 2 to 128, the model's positions" in message


@pytest.mark.parametrize(
    "option", [["--text", "gone.txt"], ["--original", "/gone"]], ids=lambda option: option[0]
)
def test_verification_inputs_are_checked_before_the_long_work(edkm, work, model, monkeypatch, option):
    from converters.coreml.write import bundle

    monkeypatch.setattr(bundle, "write_bundle", lambda *_: pytest.fail("nothing must be converted"))
    assert refused(edkm, work, model, *option).startswith(f"{option[1]}: ")


# Outputs


def test_existing_output(edkm, work, model):
    Path("model-coreml").mkdir()
    assert refused(edkm, work, model) == (
        "model-coreml already exists; choose another -o, or replace it with --overwrite."
    ).replace("model-coreml", str(model.with_name("model-coreml")))


@pytest.mark.parametrize("name", ["letter.txt", "metadata.json"])
def test_folder_that_is_not_ours_is_never_replaced(edkm, work, model, name):
    Path("home").mkdir()
    Path("home", name).write_text('{"precious": true}')
    message = refused(edkm, work, model, "-o", "home", "--overwrite", "--no-verify", "--sequence-length", 16)
    assert "home is a folder that edkm-export did not make" in message


def test_output_that_is_the_checkpoint_itself(edkm, work, model):
    assert "is a file, not a folder" in refused(edkm, work, model, "-o", model, "--overwrite")


def test_output_in_a_folder_that_is_not_there(edkm, work, model):
    assert "does not exist; make it first" in refused(edkm, work, model, "-o", "no/bundle")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "no space left on the device, or a quota is reached",
        ),
        (OSError("model.mlpackage: writing failed, is the disk full?"), "is the disk full?"),
        (MemoryError(), "out of memory"),
    ],
    ids=["no space", "coremltools' own", "memory"],
)
def test_write_that_fails(edkm, work, model, small_export, monkeypatch, failure, message, existing):
    from converters.coreml.write import bundle

    if existing:
        shutil.copytree(small_export.bundle, "bundle")

    def write(_checkpoint: Any, _plan: Any, folder: Path, name: str) -> None:
        path = folder / f"{name}.mlpackage"
        path.mkdir()
        (path / "half").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(bundle, "export_packages", write)
    assert message in refused(edkm, work, model, "-o", "bundle", "--overwrite")


@pytest.mark.usefixtures("ready_made")
def test_report_that_cannot_be_written(edkm, work, tiny_export, monkeypatch):
    real = Path.write_text

    def write_text(self: Path, *arguments: Any, **options: Any) -> int:
        if "report.md" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    message = refused(edkm, work, tiny_export.model, "-o", "bundle", "--sequence-length", 64, "--tokens", 64)
    assert "no space left on the device" in message


@pytest.mark.parametrize("name", ["metadata.json", "config.json", "report.json", "model.mlpackage"])
def test_tokenizer_file_cannot_take_the_place_of_ours(edkm, work, model, name):
    """A checkpoint from elsewhere decides the names of its tokenizer files."""
    edited(model, lambda made: dataclasses.replace(made, tokenizer={**made.tokenizer, name: b"mine"}))
    result = edkm("coreml", model, "-o", "bundle", "--sequence-length", 16, "--no-verify")
    assert "Traceback" not in result.err
    if result.status == 0:
        assert load_package("bundle/model.mlpackage").palettized()
        assert not (Path("bundle") / name).is_file() or (Path("bundle") / name).read_bytes() != b"mine"
    else:
        assert result.status == 2 and name in result.message and not Path("bundle").exists()
