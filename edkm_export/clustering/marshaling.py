"""The three memory techniques of eDKM (arXiv 2309.00964, section 2) as hooks on tensors saved for backward.

- M, marshaling (2.1): saved tensors move to the host, and views of one storage are held once.
- U, uniquification (2.2): a tensor with a row for each 16-bit weight has equal rows for equal weights; the
  distinct rows are held in a table, with an index of 2 bytes a weight.
- S, sharding (2.3): learners that compute the same thing each hold their share of what is long (indices, and
  storages that U does not apply to), and gather it again in backward.

`histogram` and `streaming` need none of this. It is here for comparison, and for layers other than ours.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from edkm_export.errors import PaletteError

__all__ = ["MarshaledTensors"]

_SHARDED_FROM = 1 << 16  # bytes; a collective for less costs more than it saves
_VERIFIED_ROWS = 1 << 20  # rows compared at a time


@dataclass(frozen=True)
class _Bytes:
    """A run of bytes, or this learner's share of it (equal shares, the last padded)."""

    held: Tensor  # uint8
    size_bytes: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> _Bytes:
        """Hold a contiguous tensor on `device`; as a reference if it is there already and is not sharded."""
        flat = values.reshape(-1).view(torch.uint8)
        size = flat.numel()
        if group is None or size < _SHARDED_FROM:
            return cls(flat.to(device), size, None)
        learners = dist.get_world_size(group)
        share = -(-size // learners)
        mine = flat[dist.get_rank(group) * share :][:share]
        # The clone gives the rest of the storage free.
        return cls(torch.nn.functional.pad(mine, (0, share - len(mine))).to(device, copy=True), size, group)

    def gather(self, device: torch.device) -> Tensor:
        """All the bytes on `device`; a collective when they are sharded."""
        if self.group is None:
            return self.held.to(device)
        # NCCL moves device memory only, gloo host memory.
        on = device if dist.get_backend(self.group) == "nccl" else self.held.device
        share = self.held.to(on)
        parts = [torch.empty_like(share) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, share, group=self.group)
        return torch.cat(parts)[: self.size_bytes].to(device)


@dataclass(frozen=True)
class _Rows:
    """Distinct rows of a storage and which of them belongs to each weight."""

    table: Tensor  # [rows of all groups, width]
    index: _Bytes  # int16 bit patterns of uint16 [groups, m]
    starts: Tensor  # first row of each group, int64 [groups]

    def gather(self, device: torch.device) -> Tensor:
        table, starts = self.table.to(device), self.starts.to(device)
        index = self.index.gather(device).view(torch.int16).view(len(starts), -1)
        out = table.new_empty(index.numel(), table.shape[1])
        stride = max(1, _VERIFIED_ROWS // len(starts))
        rows = out.view(len(starts), index.shape[1], table.shape[1])
        for start in range(0, index.shape[1], stride):
            some = slice(start, start + stride)
            rows[:, some] = table[(index[:, some].int() & 0xFFFF) + starts[:, None]]
        return out.view(-1).view(torch.uint8)


@dataclass(frozen=True)
class _Held:
    """A storage that is no longer where autograd saw it."""

    content: _Bytes | _Rows

    @property
    def size_bytes(self) -> int:
        if isinstance(self.content, _Bytes):
            return self.content.held.numel()
        table = self.content.table
        return table.numel() * table.element_size() + self.content.index.held.numel()


@dataclass(frozen=True)
class _View:
    """How to see a held storage as the tensor that was saved."""

    held: _Held
    dtype: torch.dtype
    device: torch.device
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class MarshaledTensors(torch.autograd.graph.saved_tensors_hooks):
    """Context in which tensors saved for backward are marshaled, uniquified and sharded.

    Saved tensors must not be changed in place before backward; on the host some are held by reference.

    Args:
        weight: the 16-bit weight that is being clustered, [groups, m]; needed for `uniquify` only. Other
            dtypes have no uniquification and are left as they are.
        marshal: M. Hold every storage once, on `device`. Without it each saved tensor is held for itself.
        uniquify: U. Applies to storages of a whole number, above one, of values for each weight, provided
            that the rows of equal weights are equal.
        process_group: S. Learners that run the same computation on the same weight; None shards nothing.
        device: where saved tensors are held.

    Raises:
        PaletteError: uniquify without a weight [groups, m].
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        marshal: bool = True,
        uniquify: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if uniquify and (weight is None or weight.dim() not in (2, 3)):
            raise PaletteError("uniquify needs the weight that is clustered, [groups, m].")
        self._weight = weight.detach() if uniquify and weight is not None else None
        self._marshal = marshal
        self._group = process_group
        self._device = torch.device(device)
        # A storage's address may serve another one after its death: the entry lives as long as autograd's
        # handles and is trusted only while the storage itself is alive.
        self._seen: dict[tuple[int, int], tuple[Any, weakref.ref[_Held]]] = {}
        self._held: list[weakref.ref[_Held]] = []
        super().__init__(self._pack, self._unpack)

    def __exit__(self, *exception: object) -> None:
        """Leave the context; what was saved stays readable."""
        super().__exit__(*exception)
        self._seen.clear()
        self._weight = None

    @property
    def size_bytes(self) -> int:
        """Bytes that this learner holds for backward at present."""
        alive = (reference() for reference in self._held)
        return sum(held.size_bytes for held in alive if held is not None)

    def _pack(self, tensor: Tensor) -> _View:
        tensor = tensor.detach()
        if not self._marshal:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version)
        held = None
        if key in self._seen:
            other, reference = self._seen[key]
            held = None if other.expired() else reference()
        if held is None:
            held = _Held(self._hold(tensor))
            self._held.append(weakref.ref(held))
            alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._seen[key] = (alive, weakref.ref(held))
        return _View(
            held, tensor.dtype, tensor.device, tensor.shape, tensor.stride(), int(tensor.storage_offset())
        )

    def _hold(self, tensor: Tensor) -> _Bytes | _Rows:
        entries = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = tensor.as_strided((entries,), (1,), 0)
        rows = self._distinct_rows(whole)
        return _Bytes.of(whole, self._group, self._device) if rows is None else rows

    def _distinct_rows(self, whole: Tensor) -> _Rows | None:
        weight = self._weight
        if weight is None or weight.element_size() != 2 or weight.dim() != 2:
            return None
        groups, m = weight.shape
        if whole.numel() % weight.numel() or whole.numel() == weight.numel():
            return None
        rows = whole.view(groups, m, -1)
        tables, ranks, starts = [], torch.empty(groups, m, dtype=torch.int16, device=whole.device), [0]
        for group in range(groups):
            pattern = weight[group].contiguous().view(torch.int16).int() & 0xFFFF
            last = torch.full((65536,), -1, dtype=torch.int64, device=whole.device)
            last[pattern] = torch.arange(m, device=whole.device)  # any weight of the pattern will do
            used = (last >= 0).nonzero()[:, 0]
            rank = torch.zeros(65536, dtype=torch.int16, device=whole.device)
            rank[used] = torch.arange(len(used), device=whole.device).to(torch.int16)
            ranks[group] = rank[pattern]
            table = rows[group][last[used]]
            for start in range(0, m, _VERIFIED_ROWS):
                some = slice(start, start + _VERIFIED_ROWS)
                same = table[ranks[group, some].int() & 0xFFFF] == rows[group, some]
                if not bool(same.all()):
                    return None
            tables.append(table)
            starts.append(starts[-1] + len(used))
        return _Rows(
            torch.cat(tables).to(self._device),
            _Bytes.of(ranks, self._group, self._device),
            torch.tensor(starts[:-1]),
        )

    @staticmethod
    def _unpack(view: _View) -> Tensor:
        whole = view.held.content.gather(view.device).view(view.dtype)
        return whole.as_strided(view.size, view.stride, view.offset)
