"""The recurrences of many weights in lockstep: one all-reduce a pass for all of them, instead of one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from edkm_export.clustering.fused_trace import Joined, finish
from edkm_export.training.distributed.rows import Rows

__all__ = ["agreed", "together"]

_Result = TypeVar("_Result")


def together(rows: Sequence[Rows], computations: Sequence[Joined[_Result]]) -> list[_Result]:
    """Run computations on rows side by side, all of the same number of passes; a collective.

    Sums of groups that no two processes share are whole already, and nothing is sent for them.
    """
    found: dict[int, _Result] = {}
    running: list[int] = []
    for number, own in enumerate(rows):
        if own.are_split:
            running.append(number)
        else:
            found[number] = finish(computations[number])
    sums = {number: next(computations[number]) for number in running}
    while running:
        by_group = [rows[number].of_groups(sums[number].sum(1)) for number in running]  # [groups, 2, K]
        left = []
        for number, whole in zip(running, _total(rows[0], by_group), strict=True):
            try:
                sums[number] = computations[number].send(rows[number].of_pieces(whole))
                left.append(number)
            except StopIteration as end:
                found[number] = end.value
        assert left in ([], running)
        running = left
    return [found[number] for number in range(len(rows))]


def agreed(rows: Sequence[Rows], pieces: Sequence[Tensor]) -> list[Tensor]:
    """What the pieces [pieces, k] of each group agree on, by group: [groups, k]; a collective."""
    by_group = [
        own.of_groups(torch.cat([values, values.new_ones(len(values), 1)], 1))
        for own, values in zip(rows, pieces, strict=True)
    ]
    return [whole[:, :-1] / whole[:, -1:] for whole in _total(rows[0], by_group)]


def _total(rows: Rows, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums of tensors over the processes, by one all-reduce."""
    flat = rows.processes.total(torch.cat([each.view(-1) for each in tensors]))
    parts = torch.split(flat, [each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]
