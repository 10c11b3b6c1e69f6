"""Launches of the fused kernels of DKM on a GPU: no attention in memory.

Same mathematics and same saved tensors as `histogram` and `streaming`, whose plain torch code remains the
fallback and the oracle.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edkm_export.clustering.recurrence import least_mass

__all__ = ["LEAST", "WARPS", "Passes", "bins_of", "can_fuse", "cores", "kernels", "room"]

_WEIGHT_TILE = 4096  # over weights: 32 a thread, measured 4-15% faster there
_PROGRAMS = 8  # a multiprocessor
WARPS = 4
LEAST = least_mass(torch.float32)


@cache
def kernels(name: str) -> ModuleType:
    """A module of kernels of this package, imported when it is needed."""
    return importlib.import_module(f"edkm_export.clustering.{name}")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_fuse(weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int | None) -> bool:
    """Tell whether the kernels take it: scalars on a CUDA device, float32 arithmetic, a given T, k <= 256."""
    return (
        weight.is_cuda
        and weight.dim() == 2
        and tau.dtype == torch.float32
        and iterations is not None
        and centroids.shape[1] <= 256
        and _has_triton()
    )


def bins_of(dtype: torch.dtype) -> int:
    """Bins of a group's histogram (see `histogram_kernels`); 0 for types that are not counted."""
    return {torch.bfloat16: 1 << 13, torch.float16: 1 << 16}.get(dtype, 0)


@cache
def cores(device: torch.device) -> int:
    """Multiprocessors; 1 for the CPU, where Triton's interpreter can run the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Passes:
    """Launches of passes over weights [groups, m], `parts` programs a group."""

    def __init__(self, weight: Tensor, tau: Tensor, k: int) -> None:
        self.weight, self.tau, self.k = weight, tau, k
        self.groups, self.m = weight.shape
        self.width = 1 << (k - 1).bit_length()
        self.block = max(16, _WEIGHT_TILE // self.width)
        blocks = -(-self.m // self.block)
        self.parts = max(1, min(-(-_PROGRAMS * cores(weight.device) // self.groups), blocks))
        self.chunk = -(-blocks // self.parts) * self.block

    @property
    def rows(self) -> int:
        """Programs whose sums are added up at a time."""
        return max(1, _WEIGHT_TILE // self.width)

    def sums(self) -> Tensor:
        """Room for the partial sums of a pass."""
        return self.tau.new_empty(self.groups, self.parts, 2, self.width)

    def launch(self, name: str, *arguments: Tensor | int, reduces: bool = True, **choices: bool) -> None:
        """Launch a pass, with what its kernel takes between `x` and `m`.

        `reduces`: it begins by adding up the sums of the pass before.
        """
        tail: tuple[float, ...] = (self.m, self.chunk, self.groups, self.k, self.parts)
        options: dict[str, Any] = {"K": self.width, "BLOCK": self.block, **choices}
        if reduces:
            tail, options["ROWS"] = (*tail, LEAST), self.rows
        if name == "iterate":
            options["FIRST"] = arguments[-1] == 0
        kernel = getattr(kernels("kernels"), name)
        kernel[(self.groups * self.parts,)](self.weight, *arguments, *tail, **options, num_warps=WARPS)

    def reduce(self, name: str, *arguments: Tensor | int) -> None:
        """Launch what only adds up the sums of a pass: one program a group."""
        getattr(kernels("kernels"), name)[(self.groups,)](
            *arguments,
            self.groups,
            self.k,
            self.parts,
            LEAST,
            K=self.width,
            ROWS=self.rows,
            num_warps=WARPS,
        )

    def apply_sums(self, upstream: Tensor, iterates: Tensor, collected: Tensor | None) -> Tensor:
        """Sums for the gradients of c^T and c^{T-1} through the soft weight; G d goes to `collected`."""
        applied = self.sums()
        room = upstream if collected is None else collected
        self.launch(
            "pull_apply", upstream, self.tau, iterates, applied, room, len(iterates) - 1, reduces=False,
            COLLECT=collected is not None,
        )  # fmt: skip
        return applied


def room(centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Tensors for the centroids, c^0 filled in, and the masses of each iteration."""
    groups, k = centroids.shape
    iterates = centroids.new_empty(iterations + 1, groups, k)
    iterates[0] = centroids
    return iterates, centroids.new_empty(iterations, groups, k)
