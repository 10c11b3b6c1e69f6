"""What this machine has: libraries, processor, memory and disk. Needs no torch, but for the GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BACK_ENDS",
    "BackEnd",
    "Library",
    "Machine",
    "available_memory",
    "container_memory",
    "find_libraries",
]


@dataclass(frozen=True)
class BackEnd:
    """A package that commands use.

    Attributes:
        package: its name on PyPI.
        purpose: what it is for.
        extra: the extra of ours that installs it; None: it comes with edkm-export.
    """

    package: str
    purpose: str
    extra: str | None = None

    @property
    def install(self) -> str:
        """The line that installs it."""
        return "pip install edkm-export" if self.extra is None else f"pip install 'edkm-export[{self.extra}]'"


BACK_ENDS = (
    BackEnd("torch", "everything"),
    BackEnd("transformers", "everything"),
    BackEnd("coremltools", "Core ML packages", "coreml"),
    BackEnd("onnx", "ONNX folders", "onnx"),
    BackEnd("onnxruntime", "running ONNX folders", "onnx"),
    BackEnd("coreai-core", "Core AI models", "coreai"),
    BackEnd("coreai-torch", "Core AI models", "coreai"),
    BackEnd("gguf", "GGUF files as MODEL", "gguf"),
    BackEnd("peft", "LoRA adapters", "peft"),
    BackEnd("matplotlib", "the curve of a training run", "train"),
    BackEnd("torchao", "narrow moments of a training run", "moments"),
    BackEnd("lm-eval", "benchmarks of exported models", "eval"),
)
"""In the order in which a user meets them."""


@dataclass(frozen=True)
class Library:
    """A back end, and the version that is installed; None without."""

    back_end: BackEnd
    version: str | None


def find_libraries(back_ends: Iterable[BackEnd] = BACK_ENDS) -> tuple[Library, ...]:
    """Look for packages by their metadata; none is imported."""
    found = []
    for each in back_ends:
        try:
            version: str | None = importlib.metadata.version(each.package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        found.append(Library(each, version))
    return tuple(found)


@dataclass(frozen=True)
class Machine:
    """What there is to work with.

    Attributes:
        system: such as "Linux x86_64".
        cores: processors that this process may use.
        memory_bytes, free_memory_bytes: main memory, or what a container may use of it.
        free_disk_bytes: where files would be written.
        gpu: name of the first CUDA device; None without one.
        gpu_count: number of CUDA devices.
        gpu_free_bytes: free memory of the first one.
    """

    system: str
    cores: int
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    gpu: str | None = None
    gpu_count: int = 0
    gpu_free_bytes: int = 0

    @classmethod
    def look(cls, folder: Path) -> Machine:
        """Look around; `folder` is where files would be written."""
        total, free = available_memory()
        gpu, count, gpu_free = _cuda()
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            cores=_cores(),
            memory_bytes=total,
            free_memory_bytes=free,
            free_disk_bytes=shutil.disk_usage(folder).free,
            gpu=gpu,
            gpu_count=count,
            gpu_free_bytes=gpu_free,
        )

    @property
    def is_mac(self) -> bool:
        """Whether Apple's Core ML runtime is here."""
        return self.system.startswith("Darwin")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> tuple[int, int]:
    """Main memory and what is free of it, or what a container may use; bytes."""
    import psutil  # accelerate depends on it

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit, used = container_memory()
    if limit is not None and limit < total:
        total, free = limit, max(0, min(free, limit - used))
    return total, free


def container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """Limit of a control group and what is used of it, caches that can be given up left out; None: no limit."""
    try:
        limit = int((root / "memory.max").read_text(encoding="ascii"))  # "max" without one
        used = int((root / "memory.current").read_text(encoding="ascii"))
        lines = (root / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None, 0
    caches = sum(int(line.split()[1]) for line in lines if line.split()[0] == "inactive_file")
    return limit, max(0, used - caches)


def _cuda() -> tuple[str | None, int, int]:
    """Name of the first CUDA device, how many there are, and free memory of the first."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None, 0, 0
        return torch.cuda.get_device_name(0), torch.cuda.device_count(), int(torch.cuda.mem_get_info(0)[0])
    except Exception:  # a driver that is broken is no GPU; it says so in many ways
        return None, 0, 0
