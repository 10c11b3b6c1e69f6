"""The processes that train one model together: one, or as many as torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from edkm_export.errors import InputError, TrainingError

__all__ = ["ALONE", "Processes"]

_Result = TypeVar("_Result")

# The others wait while the first measures and clusters the whole model.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """Used as a context: leaving it ends the group, or says which process failed first.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        device: where this one computes, such as "cpu" or "cuda:3".
        store: what is left of the rendezvous; None for a single process.
    """

    rank: int
    count: int
    device: str
    store: Any = None

    @classmethod
    def join(cls, device: str | None) -> Processes:
        """Meet the others, as the environment says (torchrun and accelerate launch set it).

        Args:
            device: "cpu" or "cuda"; None: cuda if there is one.

        Raises:
            InputError: there are more processes on this machine than CUDA devices.
        """
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls(0, 1, kind)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if kind == "cuda":
            if local >= torch.cuda.device_count():
                raise InputError(
                    f"process {local} of this machine finds {torch.cuda.device_count()} CUDA devices; start one "
                    "process for each, or train on the CPU with --device cpu."
                )
            torch.cuda.set_device(local)
            kind = f"cuda:{local}"
        os.environ["ACCELERATE_USE_FSDP"] = "false"  # accelerate shards on GPUs only; we do it ourselves
        store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
        return cls(rank, count, kind, store)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    def share(self, batch_size: int) -> int:
        """Windows of a micro-batch for each process.

        Raises:
            InputError: the batch cannot be divided.
        """
        if batch_size % self.count:
            below = batch_size - batch_size % self.count
            choices = f"{below} or {below + self.count}" if below else str(self.count)
            raise InputError(
                f"--batch-size {batch_size} cannot be divided among {self.count} processes; use {choices}."
            )
        return batch_size // self.count

    def first(self, task: Callable[[], _Result]) -> _Result:
        """Run a task in the first process only; all get its result."""
        if not self.are_many:
            return task()
        result = [task() if self.is_first else None]
        dist.broadcast_object_list(result, src=0)
        return result[0]  # type: ignore[return-value]

    def exchange(self, value: _Result) -> list[_Result]:
        """What each process has of something that can be pickled, in their order; in every process."""
        if not self.are_many:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.are_many:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Tensors of one shape behind each other, in every process: [n, ...] -> [count * n, ...]."""
        parts = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def number(self, value: float, *, largest: bool = False) -> float:
        """The sum of a number over the processes, or the largest."""
        if not self.are_many:
            return value
        held = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(held, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return float(held)

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.are_many:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait for all."""
        if self.are_many:
            dist.barrier()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not self.are_many:
            return
        if error is None:
            self.wait()
            dist.destroy_process_group()
        elif isinstance(error, Exception):
            # Ends this process, and with it all: the launcher stops the others, whose collectives fail.
            failed_first = False
            with contextlib.suppress(
                Exception
            ):  # the store lives in the first process, unless torchrun keeps it
                failed_first = self.store.add("edkm_export/failed", 1) == 1
            if not failed_first:
                raise TrainingError(
                    f"process {self.rank} of {self.count}: stopped, since another process failed."
                ) from error


ALONE = Processes(0, 1, "cpu")
"""An ordinary run, for what does not ask where it computes."""
