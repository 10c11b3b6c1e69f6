from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from edkm_export import machine
from edkm_export.cli import console
from edkm_export.machine import Machine
from edkm_export.reference.gguf.gguf_file import StoredTensor as GgufStored
from edkm_export.reference.stored_tensors import StoredTensors
from tests.helpers.gguf_models import tiny
from tests.helpers.gguf_writer import content, write

pytestmark = pytest.mark.usefixtures("work")

LINUX = Machine("Linux x86_64", 2, 24_000_000_000, 12_000_000_000, 100_000_000_000)


@pytest.fixture
def look(monkeypatch):
    """Make the machine another one."""

    def become(found: Machine) -> None:
        monkeypatch.setattr(Machine, "look", lambda _folder: found)

    return become


@pytest.fixture
def without(monkeypatch):
    """Make packages missing."""

    def drop(*packages: str) -> None:
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name in packages:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return drop


def line_of(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return " ".join(found.split())


def test_this_machine(edkm):
    result = edkm("doctor")
    assert result.status == 0 and result.err == ""
    assert torch.__version__.partition("+")[0] in line_of(result.out, "torch ")
    assert "GB free" in line_of(result.out, "memory ") and f"free in {Path.cwd()}" in result.out
    assert not set(result.out) & set("┃│┏┌━")  # a pipe gets lines


def test_what_is_missing_and_what_it_takes_away(edkm, look, without):
    look(LINUX)
    without("coremltools", "gguf", "onnxruntime")
    out = edkm("doctor").out
    assert (
        line_of(out, "coremltools")
        == "coremltools missing Core ML packages: pip install 'edkm-export[coreml]'"
    )
    assert line_of(out, "coreml,").endswith("no coremltools missing: pip install 'edkm-export[coreml]'")
    assert " no gguf missing: pip install 'edkm-export[gguf]'" in line_of(out, "GGUF files")
    assert " no onnxruntime missing:" in line_of(out, "verify of ONNX")
    assert line_of(out, "--adapter") == "--adapter yes"
    assert "needs macOS" in line_of(out, "Apple's Core ML runtime")


def test_core_ai_where_apple_publishes_it_and_where_not(edkm, look, monkeypatch):
    from converters.coreai import backend

    look(LINUX)
    monkeypatch.setattr(backend, "missing_backend", lambda: "Apple publishes no Core AI package here")
    assert line_of(edkm("doctor").out, "coreai, ").endswith("no Apple publishes no Core AI package here")
    monkeypatch.setattr(backend, "missing_backend", lambda: "")
    assert " yes run by Apple's Core AI runtime" in line_of(edkm("doctor").out, "coreai, ")


def test_a_mac_and_a_gpu(edkm, look):
    look(Machine("Darwin arm64", 8, 16_000_000_000, 9_000_000_000, 10**12))
    assert "Core ML runtime yes" in line_of(edkm("doctor").out, "Apple's")
    look(Machine("Linux x86_64", 8, 10**11, 10**11, 10**12, "NVIDIA H100", 2, 80 * 10**9))
    out = edkm("doctor").out
    assert "CUDA: NVIDIA H100, 2 of them, 80.0 GB free" in out
    assert "torchrun --nproc-per-node 2" in line_of(out, "train")


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_model_from_its_headers(edkm, look, tiny_llama, tmp_path, monkeypatch, form):
    model = write(content(tiny("llama")), tmp_path / "model.gguf") if form == "gguf" else tiny_llama
    for owner, name in ((GgufStored, "values"), (StoredTensors, "read")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("weights must not be read"))
    look(LINUX)
    result = edkm("doctor", model)
    assert result.status == 0, result.err
    if form == "folder":
        assert "918,656 parameters, 4 layers, vocabulary of 1,024; 1.8 MB in float16" in result.out
        assert line_of(result.out, "palettize --recipe 3bit ").split()[3] == "3.05"
        assert line_of(result.out, "train --preset 4bit").split()[3] == "4.10"
    for name in ("palettize --calibration", "train", "coreml", "onnx", "verify, 1,024 tokens"):
        assert "about " in line_of(result.out, f"edkm-export {name}")
    assert "estimates" in result.out and "2 cores" in result.out and "warning" not in result.out


def test_warnings(edkm, look, tiny_llama):
    look(Machine("Linux x86_64", 2, 10**9, 10**8, 10**6))
    out = edkm("doctor", tiny_llama).out
    assert "warning: verify takes about" in out and "use fewer --tokens" in out
    assert "warning: train takes about" in out and "--batch-size 1" in out
    assert "warning: all of them write about" in out
    memory = float(out.partition("verify takes about ")[2].split()[0])
    fewer = edkm("doctor", tiny_llama, "--tokens", 4).out
    assert float(fewer.partition("verify takes about ")[2].split()[0]) <= memory


def test_a_terminal_gets_tables(edkm, look, tiny_llama, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=shown, force_terminal=True, width=100))
    look(LINUX)
    assert edkm("doctor", tiny_llama).status == 0
    assert "┃" in shown.getvalue() and "peak memory" in shown.getvalue()


@pytest.mark.parametrize("arguments", [["./gone"], ["--adapter", "x"]])
def test_mistakes(edkm, arguments):
    result = edkm("doctor", *arguments)
    assert result.status == 2 and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": ""}, (None, 0)),
        ({}, (None, 0)),
        (
            {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 1\ninactive_file 200\n"},
            (1000, 500),
        ),
    ],
)
def test_memory_of_a_container(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.container_memory(tmp_path) == found
