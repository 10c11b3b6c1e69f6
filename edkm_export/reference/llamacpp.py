"""llama.cpp itself, through node-llama-cpp, as the oracle of what a GGUF file computes.

It shares no line with our reader. node runs it in a process of its own: a file that it cannot take may abort it.
The package is found in the folder that the variable EDKM_LLAMACPP names, or where node would look for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edkm_export.errors import BackendMissingError, InputError
from edkm_export.reference.llamacpp_unpacking import libraries, unpack

__all__ = ["INSTALL", "VARIABLE", "available", "log_probabilities", "tokenize", "unpacked", "version"]

VARIABLE = "EDKM_LLAMACPP"
"""Names a folder with node_modules/node-llama-cpp in it."""
INSTALL = (
    "npm install --ignore-scripts --prefix FOLDER node-llama-cpp, with node 20 or later, then "
    f"export {VARIABLE}=FOLDER"
)
"""How it is installed."""

_METADATA_BYTES = 1 << 28  # vocabularies and what else a file holds
_PACKAGE = "node-llama-cpp"
_SCRIPT = Path(__file__).with_suffix(".js")


def available() -> Path | None:
    """Folder of the node package, None where it or node is not installed."""
    if shutil.which("node") is None:
        return None
    named = os.environ.get(VARIABLE)
    if named:
        places = [Path(named) / "node_modules"]
    else:
        here = Path.cwd()
        places = [folder / "node_modules" for folder in (here, *here.parents)]
        places += [Path(each) for each in os.environ.get("NODE_PATH", "").split(os.pathsep) if each]
    found = (place / _PACKAGE for place in places)
    return next((path.absolute() for path in found if (path / "package.json").is_file()), None)


def version() -> str:
    """Version of the node package and of the llama.cpp in it, such as "node-llama-cpp 3.22.1 (llama.cpp v0.5.0)".

    Raises:
        BackendMissingError: it is not installed.
    """
    package = _installed()
    own = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    release = package / "llama" / "binariesGithubRelease.json"
    inner = json.loads(release.read_text(encoding="utf-8"))["release"] if release.is_file() else "unknown"
    return f"{_PACKAGE} {own} (llama.cpp {inner})"


def log_probabilities(
    path: Path | str,
    tokens: Sequence[int],
    *,
    cache: Literal["F16", "F32"] = "F16",
    deadline_s: float = 900,
) -> Tensor:
    """What llama.cpp expects after each token of a text.

    Activations are rounded to 8 bits in front of quantized weights; of float types, F32 files are the tight test.

    Args:
        path: a GGUF file; of a split one the first part.
        tokens: the text.
        cache: type of stored keys and values; llama.cpp's own default is F16.
        deadline_s: seconds after which it is stopped.

    Returns:
        float32 [tokens, vocabulary], natural logarithms.

    Raises:
        BackendMissingError: it is not installed.
        InputError: llama.cpp refuses the file, or does not finish in time.
    """
    task = {"task": "logits", "tokens": [int(each) for each in tokens], "cache": cache}
    with tempfile.TemporaryDirectory() as folder:
        answer = _ask(Path(path), task, Path(folder), deadline_s)
        count = answer.stat().st_size // 4
        # read into memory: the file goes with its folder
        logits = torch.from_file(str(answer), shared=False, size=count, dtype=torch.float32)
        return logits.reshape(len(tokens), -1).log_softmax(-1)


@contextlib.contextmanager
def unpacked(path: Path | str, size_bytes: int) -> Iterator[Path | None]:
    """The same file with its weights in float32, as llama.cpp unpacks them; it is gone after the context.

    Args:
        path: a GGUF file; of a split one the first part.
        size_bytes: that the float32 weights take.

    Yields:
        The file; None where llama.cpp's libraries are not there, or the disk has no room for it.

    Raises:
        InputError: llama.cpp refuses the file.
    """
    package = _installed()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "float32.gguf"
        room = shutil.disk_usage(folder).free
        try:
            libraries(package)
        except BackendMissingError:
            room = 0
        if room < size_bytes * 1.1 + _METADATA_BYTES:
            yield None
            return
        unpack(package, Path(path), made)
        yield made


def tokenize(
    path: Path | str, texts: Sequence[str], *, special: bool = False, deadline_s: float = 300
) -> list[list[int]]:
    """Tokens of each text, without those that would be put around it.

    Args:
        path: a GGUF file.
        texts: to be split into tokens.
        special: the names of control tokens stand for them.
        deadline_s: seconds after which it is stopped.

    Raises:
        BackendMissingError: it is not installed.
        InputError: llama.cpp refuses the file, or does not finish in time.
    """
    task = {"task": "tokenize", "texts": list(texts), "special": special}
    with tempfile.TemporaryDirectory() as folder:
        answer = _ask(Path(path), task, Path(folder), deadline_s)
        found: list[list[int]] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _installed() -> Path:
    package = available()
    if package is None:
        raise BackendMissingError(f"llama.cpp is not installed: {INSTALL}")
    return package


def _ask(path: Path, task: dict[str, Any], folder: Path, deadline_s: float) -> Path:
    """Run the script; returns the file with its answer."""
    request, answer = folder / "request.json", folder / "answer"
    content = {"package": str(_installed()), "model": str(path.absolute()), "answer": str(answer), **task}
    request.write_text(json.dumps(content), encoding="utf-8")
    try:
        done = subprocess.run(
            ["node", str(_SCRIPT), str(request)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{path}: llama.cpp did not finish within {deadline_s:g} seconds.") from error
    if done.returncode or not answer.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        causes = [line for line in said if "error" in line.lower()]
        shown = (causes or said or [f"it ended with status {done.returncode}"])[0][:300]
        raise InputError(f"{path}: llama.cpp refuses the file ({shown}).")
    return answer
