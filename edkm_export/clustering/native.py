"""Numba kernels and the threads that run them.

Every kernel releases the GIL, so plain threads scale and need no copies.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Array", "bits_of", "kernel", "numpy_of", "spread", "values_of_bits"]

Array = npt.NDArray[Any]
_F = TypeVar("_F", bound=Callable[..., Any])


def kernel(function: _F) -> _F:
    """Compile with numba: no GIL, cached on disk, indices unchecked."""
    return cast(_F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def spread(task: Callable[[int, int], None], count: int, block: int, threads: int | None = None) -> None:
    """Call `task(start, stop)` over `range(count)` in blocks, on several threads.

    Args:
        task: works on the half-open range it is given; an exception in one call is raised here.
        count: size of the range.
        block: size of a block, positive.
        threads: how many; None: as many as torch uses.
    """
    starts = range(0, count, block)
    threads = min(threads or torch.get_num_threads(), len(starts))
    if threads <= 1:
        for start in starts:
            task(start, min(start + block, count))
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda start: task(start, min(start + block, count)), starts):
            pass


def numpy_of(values: Tensor) -> Array:
    """View a CPU tensor, made contiguous, as an array."""
    array: Array = values.detach().contiguous().numpy()
    return array


def bits_of(weight: Tensor) -> Array:
    """View a contiguous 16-bit CPU tensor as its bit patterns, uint16."""
    assert weight.element_size() == 2 and weight.is_contiguous()
    return weight.detach().view(torch.int16).numpy().view(np.uint16)


def values_of_bits(dtype: torch.dtype) -> Tensor:
    """Value of each 16-bit pattern, in the order of the patterns: float32 [65536]."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    return patterns.view(dtype).float()
