"""The wheel by itself: complete, importable from elsewhere, and clear about extras that are missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import FIXTURES, ROOT

PACKAGES = ("edkm_export", "converters")
COMMANDS = ("palettize", "train", "import", "coreml", "onnx", "verify", "compare", "generate", "inspect")

# Runs the command line as if modules were not installed: HIDDEN names them.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in HIDDEN else find(name, *rest))
from edkm_export.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network from a copy of the sources."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs build: pip install 'edkm-export[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."],
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the packages of a folder, in that folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, check=False,
    )  # fmt: skip


def test_every_file_of_the_packages_is_in_it(unpacked):
    ours = {
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert ours == {path for path in packed if path.parts[0] in PACKAGES}


def test_it_says_its_version(unpacked):
    from edkm_export._version import __version__

    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in metadata.read_text(encoding="utf-8")
    found = run(unpacked, "-c", "import edkm_export; print(edkm_export.__version__, edkm_export.__file__)")
    assert found.stdout.split() == [__version__, str(unpacked / "edkm_export" / "__init__.py")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(unpacked, command):
    done = run(unpacked, "-m", "edkm_export", command, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage:"), done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a GGUF file of a Llama without tensors."""
    folder = tmp_path_factory.mktemp("place")
    key, value = b"general.architecture", b"llama"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value  # 8: a string
    (folder / "model.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + entry)
    return folder


@pytest.mark.parametrize(
    ("hidden", "extra", "arguments"),
    [
        pytest.param(
            "coremltools", "coreml", ["coreml", "TINY.PT", "--no-verify", "-o", "out"], marks=pytest.mark.slow
        ),
        ("onnx", "onnx", ["onnx", "TINY.PT", "--no-verify", "-o", "out"]),
        pytest.param("gguf", "gguf", ["palettize", "model.gguf", "-o", "out.pt"], marks=pytest.mark.slow),
    ],
    ids=["coremltools", "onnx", "gguf"],
)
def test_a_missing_extra_is_named(place, tiny_checkpoint, hidden, extra, arguments):
    from edkm_export import checkpoint

    path = place / "tiny.pt"
    if not path.exists():
        checkpoint.save(tiny_checkpoint, path)
    before = {each.name for each in place.iterdir()}
    given = [str(path) if word == "TINY.PT" else word for word in arguments]
    code = WITHOUT.replace("HIDDEN", repr((hidden,)))
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        capture_output=True, text=True, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    last = done.stderr.rstrip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("edkm-export: ") and f"pip install 'edkm-export[{extra}]'" in last
    assert {each.name for each in place.iterdir()} == before


@pytest.mark.parametrize(
    ("hidden", "extra", "call"),
    [
        ("onnxruntime", "onnx", "from converters.onnx.backend import load_onnxruntime as call"),
        ("lm_eval", "eval", "from edkm_export.verify.harness import _harness as call"),
    ],
    ids=["onnxruntime", "lm_eval"],
)
def test_a_missing_extra_is_named_in_python(hidden, extra, call):
    """What no command imports by itself, or not before long work."""
    code = WITHOUT.replace("HIDDEN", repr((hidden,))).partition("from edkm_export.cli")[0] + (
        "from edkm_export.errors import BackendMissingError\n"
        f"{call}\n"
        "try:\n    call()\nexcept BackendMissingError as error:\n    print(error)\n"
    )
    done = run(ROOT, "-c", code)
    assert f"pip install 'edkm-export[{extra}]'" in done.stdout, done.stderr


@pytest.mark.slow
def test_training_goes_on_without_matplotlib(tmp_path):
    code = WITHOUT.replace("HIDDEN", repr(("matplotlib",)))
    arguments = [
        "train", str(FIXTURES / "tiny-llama"), "--data", str(FIXTURES / "calibration.txt"), "--steps", "1",
        "--batch-size", "1", "--context", "32", "--importance", "none",
        "--bits", "4", "--log-every", "1",
    ]  # fmt: skip
    done = run(ROOT, "-c", code, *arguments, "-o", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "pip install 'edkm-export[train]'" in done.stderr
    assert (tmp_path / "run" / "model.pt").is_file() and not (tmp_path / "run" / "curve.png").exists()
