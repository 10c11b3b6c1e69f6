"""Histograms of 16-bit patterns: counting, segment sums and table look-ups, without an index in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edkm_export.clustering.native import Array, bits_of, kernel, spread, values_of_bits

__all__ = ["HostPatterns", "Patterns"]

_PATTERNS = 1 << 16
_BLOCK = 1 << 15  # weights converted to float32 at a time on the CPU; torch copies these on one thread
_LEAST_BLOCK = 1 << 10
_DEVICE_BLOCK = 1 << 22  # weights indexed at a time on other devices


class HostPatterns:
    """Histogram of 16-bit weights on the CPU (a `histogram.Table`).

    Attributes:
        values: distinct values [groups, U] in the compute dtype, in the order of their patterns.
        counts: how often each occurs [groups, U]; 0 for padding.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Count `weight` [groups, m], contiguous, float16 or bfloat16."""
        self._bits = bits_of(weight)
        groups, m = weight.shape
        self._parts = _parts(groups, m)
        counts = _zeros((groups, len(self._parts) - 1, _PATTERNS), np.int32)
        self._each(lambda group, part, some: _count(self._bits[group, some], counts[group, part]))
        used = np.zeros((groups, _most_used(counts)), np.uint16)
        frequency = np.zeros(used.shape, np.int32)
        _compact(counts, used, frequency)
        self._patterns = used
        self.values = torch.from_numpy(used.view(np.int16)).view(weight.dtype).to(dtype)
        self.counts = torch.from_numpy(frequency).to(dtype)
        self.values[self.counts == 0] = 0.0

    def _each(self, task: Callable[[int, int, slice], None]) -> None:
        """Run `task(group, part, range of weights)` on threads."""
        parts = len(self._parts) - 1

        def run(start: int, stop: int) -> None:
            for job in range(start, stop):
                group, part = divmod(job, parts)
                task(group, part, slice(self._parts[part], self._parts[part + 1]))

        spread(run, len(self._bits) * parts, 1)

    def _full(self, group: int, table: Tensor) -> Array:
        """Spread a row of a table over all patterns; 0 for unused ones."""
        row = table[group].numpy()
        full = _zeros((_PATTERNS,), row.dtype)
        # Padding repeats pattern 0 with a count of 0, and must not overwrite its entry.
        used = self.counts[group].numpy() > 0
        full[self._patterns[group][used]] = row[used]
        return full

    def look_up(self, table: Tensor, out: Tensor) -> None:
        """Write the table's entry [groups, U] of each weight to `out` [groups, m], 16-bit."""
        rounded = table.to(out.dtype).view(torch.int16)
        bits = out.view(torch.int16).numpy()
        full = [self._full(group, rounded) for group in range(len(bits))]
        self._each(lambda group, _, some: _gather(self._bits[group, some], full[group], bits[group, some]))

    def sums(self, grad: Tensor) -> Tensor:
        """Sum the gradient [groups, m] over the weights of each value, in float64: [groups, U]."""
        total = _zeros((len(grad), len(self._parts) - 1, _PATTERNS), np.float64)

        def run(group: int, part: int, some: slice) -> None:
            for block, values in _wide(grad[group], some, torch.float32):
                _add(self._bits[group, block], values.numpy(), total[group, part])

        self._each(run)
        whole = np.empty(self._patterns.shape)
        _collect(total, self._patterns, whole)
        return torch.from_numpy(whole).to(self.values.dtype).mul_(self.counts > 0)

    def combine(self, grad: Tensor, factor: Tensor, term: Tensor, out: Tensor) -> None:
        """Write `grad * factor + term` to `out` [groups, m], the tables [groups, U] looked up."""
        factors = [self._full(group, factor) for group in range(len(grad))]
        terms = [self._full(group, term) for group in range(len(grad))]

        def run(group: int, _: int, some: slice) -> None:
            for block, values in _wide(grad[group], some, factor.dtype):
                _multiply_add(self._bits[group, block], values.numpy(), factors[group], terms[group])
                out[group, block] = values

        self._each(run)


def _zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Zeros in pages of their own: those of unused patterns take no memory, and all are given back at once.

    The heap would touch them all and keep them: a megabyte beside the gradient.
    """
    dtype = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _parts(groups: int, m: int) -> list[int]:
    """Borders of the parts that one group is cut into, so that every thread has one."""
    count = max(1, min(-(-torch.get_num_threads() // groups), m // _BLOCK))
    return [m * part // count for part in range(count + 1)]


def _wide(row: Tensor, some: slice, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of a range of `row` in another dtype: (range, values). They share one buffer, one after the other.

    The last blocks are smaller, so that the buffer never takes more memory than a result that is not written yet.
    """
    start, buffer = some.start, torch.empty(0, dtype=dtype)
    while start < some.stop:
        left = some.stop - start
        size = min(left, max(min(_BLOCK, left // 4), _LEAST_BLOCK))
        if size != len(buffer):
            del buffer
            buffer = torch.from_numpy(_zeros((size,), torch.empty(0, dtype=dtype).numpy().dtype))
        yield slice(start, start + size), buffer.copy_(row[start : start + size])
        start += size


@kernel
def _count(bits: Array, counts: Array) -> None:
    for i in range(len(bits)):
        counts[bits[i]] += 1


@kernel
def _most_used(counts: Array) -> int:
    """Most distinct patterns in a group; counts [groups, parts, patterns]."""
    most = 0
    for group in range(counts.shape[0]):
        used = 0
        for pattern in range(counts.shape[2]):
            if counts[group, :, pattern].any():
                used += 1
        most = max(most, used)
    return most


@kernel
def _compact(counts: Array, patterns: Array, frequency: Array) -> None:
    for group in range(counts.shape[0]):
        used = 0
        for pattern in range(counts.shape[2]):
            found = counts[group, :, pattern].sum()
            if found:
                patterns[group, used] = pattern
                frequency[group, used] = found
                used += 1


@kernel
def _collect(sums: Array, patterns: Array, whole: Array) -> None:
    for group in range(len(patterns)):
        for place in range(patterns.shape[1]):
            whole[group, place] = sums[group, :, patterns[group, place]].sum()


@kernel
def _gather(bits: Array, table: Array, out: Array) -> None:
    for i in range(len(bits)):
        out[i] = table[bits[i]]


@kernel
def _add(bits: Array, values: Array, sums: Array) -> None:
    for i in range(len(bits)):
        sums[bits[i]] += values[i]


@kernel
def _multiply_add(bits: Array, values: Array, factors: Array, terms: Array) -> None:
    for i in range(len(bits)):
        values[i] = values[i] * factors[bits[i]] + terms[bits[i]]


class Patterns:
    """Histogram of 16-bit weights on any device, in plain torch (a `histogram.Table`).

    Attributes:
        values: distinct values [groups, U] in the compute dtype, in the order of their patterns.
        counts: how often each occurs [groups, U]; 0 for padding.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Count `weight` [groups, m], contiguous, float16 or bfloat16."""
        self._weight = weight
        groups, device = len(weight), weight.device
        counts = torch.zeros(groups * _PATTERNS, dtype=torch.int32, device=device)
        one = torch.ones((), dtype=torch.int32, device=device)
        for some in self._blocks():
            index = self._index(some)
            counts.index_add_(0, index, one.expand(len(index)))
        counts = counts.view(groups, _PATTERNS)
        used = counts > 0
        rank = used.cumsum(1, dtype=torch.int32) - 1
        size = int(rank[:, -1].max()) + 1
        group, pattern = used.nonzero(as_tuple=True)
        place = group * size + rank[group, pattern]  # [distinct values of all groups]
        self._slot = pattern + group * _PATTERNS
        self._place = place
        self.values = torch.zeros(groups * size, dtype=dtype, device=device)
        self.counts = torch.zeros_like(self.values)
        self.values[place] = values_of_bits(weight.dtype).to(device=device, dtype=dtype)[pattern]
        self.counts[place] = counts[group, pattern].to(dtype)
        self.values, self.counts = self.values.view(groups, size), self.counts.view(groups, size)

    def _blocks(self) -> list[slice]:
        size = self._weight.numel()
        return [slice(start, min(start + _DEVICE_BLOCK, size)) for start in range(0, size, _DEVICE_BLOCK)]

    def _index(self, some: slice) -> Tensor:
        """Bin of each weight of a range of the flat weight: int32."""
        index = self._weight.view(-1)[some].view(torch.int16).int() & 0xFFFF
        if len(self._weight) > 1:
            position = torch.arange(some.start, some.stop, device=index.device)
            index += (position // self._weight.shape[1]).int() * _PATTERNS
        return index

    def _full(self, table: Tensor) -> Tensor:
        full = table.new_zeros(len(self._weight) * _PATTERNS)
        full[self._slot] = table.reshape(-1)[self._place]
        return full

    def look_up(self, table: Tensor, out: Tensor) -> None:
        """Write the table's entry [groups, U] of each weight to `out` [groups, m], in its dtype."""
        full = self._full(table).to(out.dtype)
        for some in self._blocks():
            out.view(-1)[some] = full.index_select(0, self._index(some))

    def sums(self, grad: Tensor) -> Tensor:
        """Sum the gradient [groups, m] over the weights of each value, in float64: [groups, U]."""
        total = torch.zeros(len(self._weight) * _PATTERNS, dtype=torch.float64, device=grad.device)
        for some in self._blocks():
            total.index_add_(0, self._index(some), grad.reshape(-1)[some].double())
        sums = torch.zeros_like(self.values)
        sums.view(-1)[self._place] = total[self._slot].to(sums.dtype)
        return sums

    def combine(self, grad: Tensor, factor: Tensor, term: Tensor, out: Tensor) -> None:
        """Write `grad * factor + term` to `out` [groups, m], the tables [groups, U] looked up."""
        factors, terms = self._full(factor), self._full(term)
        for some in self._blocks():
            index = self._index(some)
            block = grad.reshape(-1)[some].to(factors.dtype)
            out.view(-1)[some] = (block.mul_(factors.index_select(0, index))).add_(
                terms.index_select(0, index)
            )
