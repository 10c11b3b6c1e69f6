"""Checkpoints of a learner in shares: each process writes its own part, in the background.

By `torch.distributed.checkpoint`, which cuts what it reads into other shares, or joins it, where a run goes on with
another number of processes. What is saved is copied to the memory of the CPU first; the steps wait for that copy alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from edkm_export.errors import TrainingError
from edkm_export.limits import is_out_of_memory, words_of
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.distributed.shard_index import IndexedReader, IndexedWriter
from edkm_export.training.distributed.sharded_clusters import ShardedClusters, plain
from edkm_export.training.narrow_moments import NarrowMoments, joined, parts_of
from edkm_export.training.palettized.surgery import clusters_of
from edkm_export.training.run_weights import frozen_masters

__all__ = ["Background", "load_moments", "load_weights", "stage"]

_WEIGHTS, _MOMENTS = "weights.", "moments."
_Held = dict[str, tuple[Tensor, Any]]
"""{name: what this process has of it, and the parameter whose rows these are; None: every process has it whole}."""


def _weights(model: Any) -> _Held:
    """A palettized model's state, tied tensors once, indices in the shape of their weights."""
    frozen = frozen_masters(model)
    owners = {id(each.indices): each for each in clusters_of(model).values()}
    found: _Held = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if name in frozen or id(value) in seen:
            continue
        seen.add(id(value))
        clusters = owners.get(id(value))
        if isinstance(clusters, ShardedClusters):
            found[name] = clusters.index_rows(), clusters.weight
        elif clusters is not None:
            found[name] = value.view(clusters.weight.shape), None
        else:
            found[name] = plain(value.detach()), _cut(value)
    return found


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> _Held:
    """An optimizer's state by names of parameters."""
    found: _Held = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            local = torch.as_tensor(plain(value))
            for part, tensor in parts_of(local, by_rows=True).items():
                found[f"{name}.{key}{part}"] = tensor, _cut(parameter) if local.dim() else None
    return found


def _cut(value: Any) -> Any:
    return value if isinstance(value, DTensor) else None


def _as_share(local: Tensor, like: Any, mesh: DeviceMesh | None) -> Tensor:
    """What `torch.distributed.checkpoint` takes: rows as a part of a whole."""
    if like is None:
        return local
    assert mesh is not None
    shape = torch.Size([like.shape[0], *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def stage(model: Any, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Copy what this process holds to the CPU, for `Background.write`; `mesh` is one of CPUs."""
    held = {f"{_WEIGHTS}{name}": value for name, value in _weights(model).items()}
    held |= {f"{_MOMENTS}{name}": value for name, value in _moments(model, optimizer).items()}
    return {name: _as_share(local.to("cpu", copy=True), like, mesh) for name, (local, like) in held.items()}


class Background:
    """Writes staged checkpoints while training goes on, one at a time.

    Attributes:
        mesh: of the processes' CPUs.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.mesh = init_device_mesh("cpu", (processes.count,))
        self._group = dist.new_group(backend="gloo")  # its own: the steps use the others meanwhile
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, state: Mapping[str, Tensor], folder: Path, complete: Callable[[], None]) -> None:
        """Start to write; `complete` is called in the first process when all parts are written. A collective."""
        self.wait()

        def work() -> None:
            try:
                writer = IndexedWriter(folder, sync_files=True)
                save(dict(state), storage_writer=writer, process_group=self._group)
                dist.barrier(self._group)
                if self._processes.is_first:
                    complete()
            except BaseException as error:  # raised by `wait`
                self._error = error

        # A daemon: a run that fails does not wait for others that may have ended.
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last one is written.

        Raises:
            OSError, RuntimeError: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise _cause(error)


@torch.no_grad()
def load_weights(model: Any, folder: Path, mesh: DeviceMesh | None) -> None:
    """Load weights, LUTs and indices that any number of processes wrote.

    Args:
        model: palettized, in shares or whole.
        folder: of the shards.
        mesh: of the processes' CPUs; None: there is one process.

    Raises:
        TrainingError: it belongs to another model or recipe.
    """
    held = {f"{_WEIGHTS}{name}": value for name, value in _weights(model).items()}
    unknown = [name for name in _listed(folder) if name.startswith(_WEIGHTS) and name not in held]
    if unknown:
        raise TrainingError(f"{folder}: does not fit the model: {unknown[0].removeprefix(_WEIGHTS)}.")
    rooms = {name: torch.empty_like(local, device="cpu") for name, (local, _) in held.items()}
    _read(folder, {name: _as_share(rooms[name], like, mesh) for name, (_, like) in held.items()})
    for name, (local, _) in held.items():
        local.copy_(rooms[name])
    clusters = list(clusters_of(model).values())
    if isinstance(clusters[0], ShardedClusters):
        ShardedClusters.restored_all([each for each in clusters if isinstance(each, ShardedClusters)])
    else:
        for each in clusters:
            each.restored()


@torch.no_grad()
def load_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, mesh: DeviceMesh | None
) -> None:
    """Load the optimizer's state likewise; that of its groups is as it is.

    Raises:
        TrainingError: it belongs to another model or recipe.
    """
    listed, parameters = _listed(folder), dict(model.named_parameters())
    rooms: dict[str, dict[str, Tensor]] = {}
    shares: dict[str, Tensor] = {}
    for full, (size, dtype) in listed.items():
        if not full.startswith(_MOMENTS):
            continue
        name, key = _split(full.removeprefix(_MOMENTS), folder)
        if name not in parameters:
            raise TrainingError(f"{folder}: does not fit the model: {name}.")
        like = _cut(parameters[name]) if size else None
        shape = size if like is None else (len(plain(like)), *size[1:])
        room = rooms.setdefault(name, {})[key] = torch.empty(shape, dtype=dtype)
        shares[full] = _as_share(room, like, mesh)
    _read(folder, shares)
    for name, parts in rooms.items():
        parameter = parameters[name]
        own = {key: value.to(plain(parameter).device) for key, value in parts.items()}
        if isinstance(optimizer, NarrowMoments):
            optimizer.restore(parameter, joined(own))
        else:
            optimizer.state[parameter] = {
                key: _like(value, parameter) if value.dim() else value for key, value in own.items()
            }


def _like(local: Tensor, parameter: nn.Parameter) -> Tensor:
    return _as_share(local, _cut(parameter), getattr(parameter, "device_mesh", None))


def _split(name: str, folder: Path) -> tuple[str, str]:
    """Name of the parameter, and of a part of its state."""
    for key in ("step", "exp_avg", "exp_avg_sq"):
        before, found, after = name.rpartition(f".{key}")
        if found and after in ("", ".codes", ".scale"):
            return before, f"{key}{after}"
    raise TrainingError(f"{folder}: holds {name}, which is no part of the optimizer's state.")


def _listed(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{name: shape and dtype} of the tensors in a checkpoint."""
    with _explained(folder):
        found = IndexedReader(folder).read_metadata().state_dict_metadata
    return {
        name: (tuple(each.size), each.properties.dtype)
        for name, each in found.items()
        if isinstance(each, TensorStorageMetadata)
    }


def _read(folder: Path, shares: dict[str, Any]) -> None:
    with _explained(folder):
        load(shares, storage_reader=IndexedReader(folder), no_dist=not dist.is_initialized())


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the first process that failed: PyTorch wraps it in what is no `Exception`."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the reader raises has no common base."""
    try:
        yield
    except (Exception, CheckpointException) as raised:
        error = _cause(raised)
        if is_out_of_memory(error):
            raise error from raised
        raise TrainingError(
            f"{folder}: does not fit the model ({' '.join(words_of(error).split())[:200]})."
        ) from error
