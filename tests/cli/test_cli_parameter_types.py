"""What names nothing on disk is refused before anything slow is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("torch", "transformers", "coremltools", "onnx", "onnxruntime", "numba")
MISSING = {
    "palettize nope": "nope: no such file or folder; models of the hub are named OWNER/NAME.",
    "palettize ./nope": "./nope: no such file or folder.",
    "palettize a/b.gguf": "a/b.gguf: no such file or folder.",
    "palettize there.pt": "there.pt: expected a Hugging Face folder, a hub id or a .gguf file, not a .pt file.",
    "palettize model --calibration nope.txt": "nope.txt: no such text file.",
    "palettize model --calibration model": "model: is a folder and cannot be read as a text; name a file in it.",
    "palettize model --recipe nope.yaml": "nope.yaml: no such recipe file.",
    "palettize model --adapter nope": "nope: no such folder; --adapter takes the folder of an adapter",
    "palettize adapter": "adapter: holds a LoRA adapter (adapter_config.json), which changes the model",
    "inspect nope": "nope: no such file or folder",
    "train nope --data there.txt -o run": "nope: no such file or folder",
    "train model --data nope.txt -o run": "nope.txt: no such text file.",
    "train model --data there.txt -o run --eval-text nope.txt": "nope.txt: no such text file.",
    "train model --data there.txt -o run --config nope.yaml": "nope.yaml: no such file.",
    "train adapter --data there.txt -o run": "adapter: holds a LoRA adapter",
    "import nope.pt -o out.pt": "nope.pt: no such file.",
    "import there.pt --model nope -o out.pt": "nope: no such file or folder",
    "import there.pt --model adapter -o out.pt": "adapter: holds a LoRA adapter, and a palettized model has no weights",
    "coreml nope.pt": "nope.pt: no such file; make one with `edkm-export palettize MODEL -o nope.pt`.",
    "coreml model": "model: is a folder; to palettize it run `edkm-export palettize model -o model.pt`.",
    "coreml there.pt --text nope.txt": "nope.txt: no such text file.",
    "coreml there.pt --original nope": "nope: no such file or folder",
    "onnx nope.pt": "nope.pt: no such file; make one with",
    "onnx there.pt --original adapter": "adapter: holds a LoRA adapter",
    "onnx there.pt --run nope": "nope: no such folder.",
    "verify nope.pt package": "nope.pt: no such file; make one with",
    "verify there.pt nope": "nope: no such package.",
    "verify there.pt model --text nope.txt": "nope.txt: no such text file.",
    "verify there.pt model --original adapter": "adapter: holds a LoRA adapter",
    "verify there.pt model --original model --adapter nope": "nope: no such folder",
    "verify there.pt model --run there.txt": "there.txt: is a file, expected the folder of a training run.",
    "compare nope.pt": "nope.pt: no such file or folder.",
    "compare there.pt nope": "nope: no such file or folder.",
    "compare there.pt --text nope.txt": "nope.txt: no such text file.",
    "compare there.pt --original adapter": "adapter: holds a LoRA adapter",
    "generate nope.pt --prompt x": "nope.pt: no such file or folder.",
}  # fmt: skip
PROGRAM = f"""
import contextlib, io, json, sys
from edkm_export.cli.main import main
for line in json.load(sys.stdin):
    sys.argv, shown, status = ["edkm-export", *line.split()], io.StringIO(), None
    try:
        with contextlib.redirect_stderr(shown):
            main()
    except SystemExit as end:
        status = end.code
    print(json.dumps([status, shown.getvalue(), [name for name in {SLOW} if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, tuple[int, str, list[str]]]:
    """Status, what was said, and which slow packages were imported, for each line; one process for all."""
    folder = tmp_path_factory.mktemp("missing")
    for name in ("there.pt", "there.txt"):
        (folder / name).write_text("Some words, so that it is a text and long enough to be one.")
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    lines = list(MISSING)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "model", "there.pt", "there.txt"]
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", MISSING)
def test_missing_is_refused_at_once(refusals, line):
    status, shown, imported = refusals[line]
    assert status == 2 and shown.startswith(f"edkm-export: {MISSING[line]}") and shown.count("\n") == 1
    assert imported == []


@pytest.mark.parametrize("words", [["verify", "there.pt", "model"], ["compare", "there.pt"]])
def test_adapter_needs_an_original(edkm, work, words):
    Path("there.pt").touch()
    Path("model").mkdir()
    result = edkm(*words, "--adapter", "model")
    assert result.status == 2 and "--adapter is merged into the model of --original; give both." in result.err
