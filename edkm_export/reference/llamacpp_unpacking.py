"""Quantized weights as llama.cpp itself unpacks them: its library rewrites a GGUF file with float32 weights.

With quantized weights llama.cpp rounds activations to 8 bits, which hides small faults of a reader. With the same
weights in float32 it does not, and what unpacks them here shares no line with our reader.

    python llamacpp_unpacking.py LIBRARIES SOURCE DESTINATION

is what `unpack` runs in a process of its own: a file that llama.cpp cannot take may abort it.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

from edkm_export.errors import BackendMissingError, InputError

__all__ = ["libraries", "unpack"]

_FLOAT32 = 0  # LLAMA_FTYPE_ALL_F32
_SYSTEMS = {"Linux": "linux", "Darwin": "mac"}
_MACHINES = {"x86_64": "x64", "AMD64": "x64", "aarch64": "arm64", "arm64": "arm64"}


class _Parameters(ctypes.Structure):
    """The first fields of llama_model_quantize_params; the others keep their defaults."""

    _fields_ = [
        ("threads", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("type_of_output", ctypes.c_int32),
        ("type_of_embedding", ctypes.c_int32),
        ("from_quantized", ctypes.c_bool),
        ("others", ctypes.c_byte * 507),
    ]


def libraries(package: Path) -> Path:
    """Folder of llama.cpp's shared libraries for this machine.

    Args:
        package: folder of node-llama-cpp; its binaries are beside it.

    Raises:
        BackendMissingError: there are none.
    """
    name = f"{_SYSTEMS.get(platform.system())}-{_MACHINES.get(platform.machine())}"
    folders = sorted((package.parent / "@node-llama-cpp").glob(f"{name}*/bins/*"))
    for folder in folders:
        if any(folder.glob("libllama.*")) and "cuda" not in folder.name and "vulkan" not in folder.name:
            return folder
    raise BackendMissingError(f"llama.cpp's own libraries are not beside {package.name}, for {name}.")


def unpack(package: Path, source: Path, destination: Path, *, deadline_s: float = 900) -> None:
    """Write a GGUF file again, with float32 weights.

    Args:
        package: folder of node-llama-cpp.
        source: the file; of a split one the first part.
        destination: four bytes a weight.
        deadline_s: seconds after which it is stopped.

    Raises:
        BackendMissingError: the libraries are not there.
        InputError: llama.cpp refuses the file, or does not finish in time.
    """
    words = [
        sys.executable,
        __file__,
        str(libraries(package)),
        str(source.absolute()),
        str(destination.absolute()),
    ]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{source}: llama.cpp did not unpack it within {deadline_s:g} seconds.") from error
    if done.returncode or not destination.is_file():
        said = [
            line.strip()
            for line in done.stderr.splitlines()
            if "error" in line.lower() or "fail" in line.lower()
        ]
        reason = (said or [f"status {done.returncode}"])[0][:300]
        raise InputError(f"{source}: llama.cpp cannot unpack its weights ({reason}).")


def _main(folder: Path, source: str, destination: str) -> int:
    """Status 0 when it was written."""
    for pattern in ("libggml-base.*", "libggml.*", "libllama.*"):  # each needs the one before
        library = ctypes.CDLL(str(min(folder.glob(pattern))), mode=ctypes.RTLD_GLOBAL)
    defaults = library.llama_model_quantize_default_params
    defaults.restype = _Parameters
    parameters = defaults()
    parameters.threads, parameters.type, parameters.from_quantized = 1, _FLOAT32, True
    write = library.llama_model_quantize
    write.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    write.restype = ctypes.c_uint32
    return int(write(source.encode(), destination.encode(), ctypes.byref(parameters)) != 0)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
