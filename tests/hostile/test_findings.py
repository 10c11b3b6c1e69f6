"""What was found, case by case: each once ended in a traceback, a hang, gigabytes, or a terminal that obeyed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from converters.onnx.backend import load_onnxruntime
from edkm_export.errors import CheckpointError, InputError
from edkm_export.importing import import_state
from edkm_export.training import run_log
from edkm_export.training.run_record import RunRecord
from tests.helpers.paths import FIXTURES
from tests.hostile.archives import rewrite
from tests.hostile.harness import Outcome, command, run_case
from tests.hostile.oddities import change_file

KINDS = ("empty", "folder", "fifo", "loop", "device", "random", "sparse", "text")


class Chosen:
    """Draws what is wanted."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def choice(self, choices: Any) -> Any:
        return self.kind if self.kind in choices else choices[-1]


def put(kind: str, path: Path) -> None:
    change_file(Chosen(kind), path)  # type: ignore[arg-type]


def tried(folder: Path, *arguments: object) -> Outcome:
    outcome = run_case([command(*arguments)], folder)
    assert not outcome.faults, (outcome.faults, outcome.text[-2000:])
    return outcome


def refused(folder: Path, *arguments: object) -> str:
    outcome = tried(folder, *arguments)
    assert outcome.statuses == [2], outcome.text[-2000:]
    lines = [line for line in outcome.text.splitlines() if line.startswith("edkm-export: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def model(small_export, tmp_path) -> Path:
    (tmp_path / "it").mkdir()
    return Path(shutil.copy(small_export.model, tmp_path / "it" / "model.pt"))


@pytest.fixture
def source(small_folder, tmp_path) -> Path:
    return Path(shutil.copytree(small_folder, tmp_path / "it"))


@pytest.fixture
def package(small_export, tmp_path) -> Path:
    return Path(shutil.copytree(small_export.bundle, tmp_path / "it")) / small_export.package.name


# Pipes, devices, terabytes of nothing


@pytest.mark.parametrize("kind", KINDS)
def test_model_pt_is_something_else(kind, model) -> None:
    put(kind, model)
    refused(model.parent, "inspect", model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_of_a_source_is_something_else(kind, name, source) -> None:
    put(kind, source / name)
    refused(source, "palettize", source, "-o", source / "out.pt", "--no-estimate")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["Manifest.json", "*.mlmodel", "weight.bin"])
def test_a_file_of_a_package_is_something_else(kind, pattern, package) -> None:
    put(kind, next(package.rglob(pattern)))
    refused(package.parent, "inspect", package)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_and_data_are_something_else(kind, source) -> None:
    for name in ("it.yaml", "it.jsonl", "it.txt"):
        (source / name).write_text("{}", encoding="utf-8")
        put(kind, source / name)
    refused(source, "palettize", source, "--recipe", source / "it.yaml", "-o", source / "out.pt")
    if kind != "text":
        refused(source, "palettize", source, "--calibration", source / "it.txt", "-o", source / "out.pt")
    refused(source, "train", source, "--data", source / "it.jsonl", "-o", source / "run")


def test_a_text_through_a_pipe_is_read(source) -> None:
    """As shells make them for `<(command)`; nobody has to hurry."""
    outer, inner = os.pipe()
    os.write(inner, b"The quick brown fox jumps over the lazy dog. " * 20)
    os.close(inner)
    from edkm_export.text import read_text

    assert read_text(f"/dev/fd/{outer}").startswith("The quick")
    os.close(outer)


# model.pt


@pytest.mark.parametrize(
    ("pickled", "method"),
    [
        (None, zipfile.ZIP_DEFLATED),
        (pickle.dumps({"format": "a" * (300 << 20)}, protocol=2), zipfile.ZIP_DEFLATED),
        (b"\x80\x02](" + b"}" * (3 << 20) + b"e.", zipfile.ZIP_STORED),
        (b"\x80\x02](" + b"}" * (30 << 20) + b"e.", zipfile.ZIP_STORED),
        (b"\x80\x02](" + b"}" * (30 << 20) + b"e.", zipfile.ZIP_DEFLATED),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", zipfile.ZIP_STORED),
        (b"\x80\x02}q\x00" + b"2" * (5 << 20) + b".", zipfile.ZIP_STORED),
    ],
    ids=["compressed", "bomb", "3 million", "30 million", "30 million, compressed", "deep", "long"],
)
def test_pickles_without_bounds(pickled, method, model) -> None:
    rewrite(model, pickled, method)
    refused(model.parent, "inspect", model)
    refused(model.parent, "import", model, "--model", model.parent, "-o", model.parent / "out.pt")


# What is printed

EVIL = "a\x1b]0;owned\x07\x1b[31m\u202e[/red][link=https://example.org]x[/link]\x9b2J"


def test_names_of_a_package_are_printed_harmlessly(package) -> None:
    from coremltools.proto import Model_pb2

    path = next(package.rglob("*.mlmodel"))
    message = Model_pb2.Model()
    message.ParseFromString(path.read_bytes())
    functions = message.mlProgram.functions
    functions[EVIL].CopyFrom(functions["main"])
    del functions["main"]
    message.description.defaultFunctionName = EVIL
    path.write_bytes(message.SerializeToString())
    shown = tried(package.parent, "inspect", package)
    assert shown.statuses == [0] and "[/red][link=https://example.org]x[/link]" in shown.text
    assert "a\\x1b]0;owned\\x07" in shown.text
    assert "\\x1b]0;owned" in refused(package.parent, "run", package, "-o", package.parent / "out.npz")


def test_a_path_is_printed_harmlessly(tmp_path) -> None:
    (tmp_path / "it").mkdir()
    message = refused(tmp_path / "it", "inspect", tmp_path / "it" / f"{EVIL}.pt")
    assert "\\x1b]0;owned" in message


def test_a_log_file_is_harmless(tmp_path) -> None:
    (tmp_path / "it").mkdir()
    log = tmp_path / "it" / "log"
    refused(tmp_path / "it", "inspect", tmp_path / f"{EVIL}.pt", "--log-file", log)
    assert "\x1b" not in log.read_text(encoding="utf-8")


def test_a_card_of_a_hostile_name(small_export, tmp_path) -> None:
    """A name that would be HTML, a heading or a program is text in README.md, in its Swift snippet too."""
    name = 'x"; exit(1) //\\(exit(1)) <script>alert(1)</script> # y'
    from edkm_export.api.formats import CoreMLFormat
    from edkm_export.model_card import model_card

    form = CoreMLFormat()
    plan = form.plan(small_export.checkpoint)
    card = model_card(
        small_export.checkpoint, name, form.card(small_export.checkpoint, plan, name), "PASS", "fine"
    )
    prose, _, rest = card.partition("```")
    assert "<script>" not in prose and "# x" in prose
    assert (
        'x\\"; exit(1) //\\\\(exit(1)) <script>' in rest
    )  # inside of a string, its quote and backslash escaped


# Sessions and streams


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["tables", "json"])
def test_a_reader_that_has_left(more, small_export) -> None:
    """`inspect | head`: status 0, and nothing on standard error."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "edkm_export", "inspect", str(small_export.model), *more],
        stdout=theirs,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(theirs)
    assert done.returncode == 0 and done.stderr == b""


# import

NAME = "a.weight"
BUFFER = "a._COREML_/weight/"


def finalized(**buffers: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight of four values with its buffers."""
    lut = torch.tensor([1.0, 2.0, 3.0, 4.0])
    plain = {"lut": lut.view(1, 1, 4, 1), "compression_type": torch.tensor([2])}
    state = {NAME: lut[torch.arange(32).view(4, 8) % 4], "norm.weight": torch.ones(4)}
    return state | {BUFFER + name: value for name, value in {**plain, **buffers}.items()}


def test_what_is_sound_is_imported() -> None:
    assert list(import_state(finalized(), "it").palettized) == [NAME]


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(4, 8, device="meta"),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse rows": lambda: torch.eye(4).to_sparse_csr(),
    "expanded": lambda: torch.ones(1).expand(4000, 8000),
    "float8": lambda: torch.ones(4, 8).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(4, 8, dtype=torch.complex64),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8),
    "empty": lambda: torch.empty(0),
    "no rows": lambda: torch.empty(0, 8),
    "no columns": lambda: torch.empty(4, 0),
    "a scalar": lambda: torch.tensor(float("nan")),
    "integers": lambda: torch.ones(4, 8, dtype=torch.int32),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "place", [NAME, "norm.weight", *(BUFFER + part for part in ("lut", "compression_type", "x"))]
)
def test_odd_tensors_are_refused(kind, place) -> None:
    state = finalized() | {place: ODD[kind]()}
    if place == BUFFER + "x" and kind in ("integers", "a scalar"):
        return  # a buffer that nothing reads
    with pytest.raises(CheckpointError, match="^it: "):
        import_state(state, "it")


@pytest.mark.parametrize(
    "buffers",
    [
        {"compression_type": torch.tensor([float("nan")])},
        {"compression_type": torch.tensor([float("inf"), 2.0])},
        {"compression_type": torch.tensor([2.5])},
        {"compression_type": torch.tensor([2**62])},
        {"vector_axis": torch.tensor([0, 1])},
        {"vector_axis": torch.tensor(float("nan"))},
        {"lut": torch.ones(1, 1, 300, 1)},
        {"lut": torch.ones(3, 1, 4, 1)},
        {"lut": torch.ones(1, 1, 4, 3)},
        {"lut": torch.ones(4)},
        {"lut": torch.full((1, 1, 4, 1), float("nan"))},
        {"palettization_scale": torch.ones(5)},
        {"palettization_scale": torch.full((4, 1), float("nan"))},
        {"palettization_scale": torch.tensor(1.0)},
        {"compression_type": torch.tensor([2, 3])},
        {"compression_type": torch.tensor([2, 3]), "quantization_n_bits": torch.tensor(float("nan"))},
        {"compression_type": torch.tensor([2, 3]), "quantization_n_bits": torch.tensor([8, 8])},
        {
            "compression_type": torch.tensor([2, 3]),
            "quantization_n_bits": torch.tensor(8),
            "quantization_scale": torch.tensor(0.0),
        },
        {
            "compression_type": torch.tensor([2, 3]),
            "quantization_n_bits": torch.tensor(8),
            "quantization_scale": torch.zeros(1, 1, 1),
        },
        {
            "compression_type": torch.tensor([2, 3]),
            "quantization_n_bits": torch.tensor(8),
            "quantization_scale": torch.ones(7, 1, 1),
        },
    ],
    ids=range(20),
)
def test_odd_buffers_are_refused(buffers) -> None:
    with pytest.raises(CheckpointError, match="^it: "):
        import_state(finalized(**buffers), "it")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("part", ["original", "0.lut", "0.indices", "0.scale", "0.zero_point"])
def test_odd_parts_of_coreai_opt_are_refused(kind, part) -> None:
    begin = "a.parametrizations.weight."
    state = {
        f"{begin}original": torch.empty(0),
        f"{begin}0.lut": torch.arange(4.0).view(1, 1, 4, 1).half(),
        f"{begin}0.indices": torch.zeros(4, 8, dtype=torch.uint8),
    }
    assert list(import_state(state, "it").palettized) == [NAME]
    if part == "original" and kind in ("empty", "no rows", "no columns", "a scalar", "integers"):
        return  # nothing is read of it
    if part == "0.zero_point" and kind in ("a scalar", "integers"):
        return  # likewise, without a scale
    with pytest.raises(CheckpointError, match="^it: "):
        import_state(state | {f"{begin}{part}": ODD[kind]()}, "it")


# Settings of JSON


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' + "9" * 100_000 + "}", "nan", "", "[]", "\ufeff{}", "{}"], ids=range(7)
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_settings_that_are_none(text, name, source) -> None:
    (source / name).write_text(text, encoding="utf-8")
    outcome = tried(source, "palettize", source, "-o", source / "out.pt", "--no-estimate")
    assert outcome.statuses == [2] or text in ("{}", "\ufeff{}")


def test_templates_without_end(source) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    loop = "{% for a in range(99999) %}"
    settings["chat_template"] = loop * 4 + "x" + "{% endfor %}" * 4
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (source / "it.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hi"}]}\n' * 30, encoding="utf-8"
    )
    message = refused(
        source, "train", source, "--data", source / "it.jsonl", "-o", source / "run", "--steps", 1
    )
    assert "was stopped" in message or "too much memory" in message


@pytest.mark.parametrize("template", [7, ["x"], {"default": 7}, [{"name": "a", "template": None}], True])
def test_a_template_that_is_no_text(template, source) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = template
    (source / "chat_template.jinja").unlink(missing_ok=True)
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    message = refused(source, "palettize", source, "-o", source / "out.pt", "--no-estimate")
    assert "template" in message


def test_onnxruntime_prints_nothing(capfd) -> None:
    """Its log of what fails holds names of the graph, and colours."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "index"], ["row"], name="\x1b[2J")],
        "lookup",
        [onnx.helper.make_tensor_value_info("index", onnx.TensorProto.INT64, [1])],
        [onnx.helper.make_tensor_value_info("row", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor("table", onnx.TensorProto.FLOAT, [2], [0.0, 1.0])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    session = load_onnxruntime().InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {"index": np.array([9])})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["main.mlirb", "main.hash", "metadata.json"])
def test_a_file_of_a_core_ai_model_is_something_else(kind, name, tmp_path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "coreai" / "model.aimodel", tmp_path / "it" / "model.aimodel"))
    put(kind, folder / name)
    assert refused(folder.parent, "inspect", folder)


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse", "folder"])
@pytest.mark.parametrize("name", ["metadata.json", "log.jsonl"])
def test_a_file_of_a_run_is_something_else(kind, name, tmp_path) -> None:
    path = tmp_path / name
    path.touch()
    put(kind, path)
    with pytest.raises(InputError, match="cannot be read"):
        RunRecord.read(path) if name == "metadata.json" else run_log.records(path)
