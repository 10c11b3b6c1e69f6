"""Which rows of a weight a process holds, and how sums over groups of rows come together again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edkm_export.errors import InputError
from edkm_export.training.distributed.processes import Processes

__all__ = ["Rows"]


class Rows:
    """Equal runs of rows, the last ones shorter, as FSDP2 cuts dimension 0.

    A boundary may fall inside a group of rows that share a LUT; with one LUT for the weight it always does. A
    process therefore sees its rows as pieces, the longest equal runs that lie within one group each. Sums over
    the weights of a piece are added up to those of its group, over all processes.

    Attributes:
        start, stop: rows that this process holds.
        share: rows of a full share, to which shorter ones are padded.
        group_of: group of each piece, int64 [pieces].
        are_split: whether a group may lie in two processes.
    """

    def __init__(self, name: str, rows: int, groups: int, processes: Processes, device: torch.device) -> None:
        self.processes, self.groups = processes, groups
        self.share = -(-rows // processes.count)
        if self.share * (processes.count - 1) >= rows:
            raise InputError(
                f"{name}: its {rows} rows cannot be shared among {processes.count} processes so that each holds "
                "some; start fewer."
            )
        self.start = processes.rank * self.share
        self.stop = min(self.start + self.share, rows)
        group_rows = rows // groups
        piece = math.gcd(group_rows, self.share)
        self.are_split = piece != group_rows
        starts = torch.arange(self.start, self.stop, piece, device=device)
        self.group_of = torch.div(starts, group_rows, rounding_mode="floor")

    @property
    def pieces(self) -> int:
        """Number of pieces of this process."""
        return len(self.group_of)

    def view(self, values: Tensor) -> Tensor:
        """The rows of this process as [pieces, weights of a piece]."""
        return values.reshape(self.pieces, -1)

    def of_pieces(self, table: Tensor) -> Tensor:
        """What belongs to each piece: [groups, ...] -> [pieces, ...]."""
        return table.index_select(0, self.group_of)

    def of_groups(self, sums: Tensor) -> Tensor:
        """Sums of this process's pieces by group, [pieces, ...] -> [groups, ...]; zero where it has none."""
        return sums.new_zeros(self.groups, *sums.shape[1:]).index_add_(0, self.group_of, sums)

    def total(self, sums: Tensor) -> Tensor:
        """Sums by group over all processes, [pieces, ...] -> [groups, ...]."""
        return self.processes.total(self.of_groups(sums))

    def total_of_pieces(self, sums: Tensor) -> Tensor:
        """Sums over all pieces of the same group, of all processes, for each piece: [pieces, ...] -> [pieces, ...]."""
        return self.of_pieces(self.total(sums))

    def of_any_piece(self, values: Tensor) -> Tensor:
        """What all pieces of a group agree on, by group over all processes: [pieces, k] -> [groups, k]."""
        return self.total(values) / self.total(torch.ones_like(values[:, :1]))

    def gather(self, padded: Tensor, rows: int) -> Tensor:
        """All rows, from each process's share padded to `share` rows: [rows, ...]."""
        return self.processes.gather(padded)[:rows]
