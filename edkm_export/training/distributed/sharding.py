"""A learner in shares: FSDP2 for weights, one all-reduce for LUTs, whole tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from edkm_export.errors import TrainingError
from edkm_export.training.distributed.sharded_clusters import ShardedClusters, plain
from edkm_export.training.distributed.shares import Shares
from edkm_export.training.narrow_moments import NarrowMoments, joined, parts_of
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.surgery import clusters_of
from edkm_export.training.run_weights import frozen_masters

__all__ = ["Sharding"]


class Sharding:
    """Cuts what is left of a learner into shares, in place, and handles what FSDP2 does not.

    Args:
        learner: the module that is trained; its `model` is what `Shares.student` built.
        shares: that built it.
    """

    def __init__(self, learner: Any, shares: Shares) -> None:
        self.learner, self.processes, self.mesh = learner, shares.processes, shares.mesh
        self.optimizer: Any = None  # set by what trains it
        found = clusters_of(learner.model).values()
        self.clusters = [each for each in found if isinstance(each, ShardedClusters)]
        assert len(self.clusters) == len(found)
        whole: set[nn.Parameter] = {clusters.lut for clusters in self.clusters}
        # Resharded after the forward pass too, so that weights are in shares whenever no pass is under way.
        fully_shard(learner, mesh=self.mesh, ignored_params=whole, reshard_after_forward=True)
        register_fsdp_forward_method(learner, "logits")

    @torch.no_grad()
    def finish_gradients(self, batch: ClusterBatch) -> None:
        """After the last backward pass of a step: gradients of LUTs and through soft k-means.

        Each process sums the rows that it holds; one all-reduce of all LUTs' sums follows. `batch` is of all clusters.
        """
        learned = [each for each in self.clusters if each.weight.grad is not None]
        with_luts = [each for each in learned if each.lut.requires_grad]
        if with_luts and batch.can_sum:
            batch.sum_gradients(self.processes.total)
        elif with_luts:
            sums = [each.lut_sums(each.own(each.weight.grad)) for each in with_luts]
            flat = self.processes.total(torch.cat([part.view(-1) for part in sums]))
            parts = torch.split(flat, [part.numel() for part in sums])
            for each, part in zip(with_luts, parts, strict=True):
                each.lut.grad = part.view(each.lut.shape).to(each.lut.dtype) * each.factor
        ShardedClusters.soften_gradients(learned)

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> Tensor:
        """Scale all gradients so that their common norm is at most `limit`; the norm before that."""
        with_grad = [parameter for parameter in self.learner.parameters() if parameter.grad is not None]
        shares = [plain(each.grad) for each in with_grad if isinstance(each, DTensor)]
        whole = [plain(each.grad) for each in with_grad if not isinstance(each, DTensor)]
        square = nn.utils.get_total_norm(shares).square().to(self.processes.device)
        norm = (self.processes.total(square) + nn.utils.get_total_norm(whole).square()).sqrt()
        if limit > 0:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for grad in (*shares, *whole):
                grad.mul_(factor)
        return norm

    def _gather(self, value: DTensor) -> Tensor:
        rows = value.shape[0]
        share = -(-rows // self.processes.count)
        local = plain(value)
        padded = local.new_zeros(share, *value.shape[1:])
        padded[: len(local)] = local
        return self.processes.gather(padded)[:rows]

    def whole_parameter(self, parameter: nn.Parameter) -> Tensor:
        """A parameter of all processes, in every process."""
        return self._gather(parameter) if isinstance(parameter, DTensor) else parameter.detach()

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Take this process's shares out of whole tensors, as `run_weights.save_weights` writes them.

        Raises:
            TrainingError: they belong to another model or recipe.
        """
        indices = {id(each.indices): each for each in self.clusters}
        held = self.learner.model.state_dict(keep_vars=True)
        excused = frozen_masters(self.learner.model)
        wrong = [name for name in state if name not in held]
        for name, value in held.items():
            if name not in state:
                wrong += [] if name in excused else [name]
                continue
            clusters, given = indices.get(id(value)), state[name]
            own = value.detach() if clusters is None else clusters.index_rows()
            like = value if clusters is None else clusters.weight
            if isinstance(like, DTensor):
                given = self._rows(given.view(like.shape) if given.numel() == like.numel() else given, like)
                own = plain(own)
            if given.shape != own.shape:
                wrong.append(name)
            else:
                own.copy_(given)
        if wrong:
            raise TrainingError(f"{folder}: does not fit the model: {', '.join(wrong[:4])}.")
        ShardedClusters.restored_all(self.clusters)

    def _rows(self, whole: Tensor, like: Tensor) -> Tensor:
        """Of a whole tensor, the rows that this process holds of a parameter."""
        share = -(-like.shape[0] // self.processes.count)
        start = min(self.processes.rank * share, len(whole))
        return whole[start : start + share]

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take this process's shares out of the state of a single process's optimizer."""
        parameters = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]  # numbered in this order, torch.optim.Optimizer.state_dict
        if isinstance(self.optimizer, NarrowMoments):
            self.optimizer.load_state_dict({**state, "state": {}})
            for number, values in state["state"].items():
                self.optimizer.restore(parameters[number], self._narrow(values, parameters[number]))
            return
        own = {
            number: {
                name: self._cut(value, parameters[number])
                if isinstance(value, Tensor) and value.dim()
                else value
                for name, value in values.items()
            }
            for number, values in state["state"].items()
        }
        self.optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})

    def _narrow(self, values: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """The rows that this process holds of the state of a parameter."""
        parts = {
            f"{key}{part}": tensor
            for key, value in joined(values).items()
            for part, tensor in parts_of(value, by_rows=True).items()
        }
        device, is_cut = plain(parameter).device, isinstance(parameter, DTensor)
        return joined(
            {
                key: (self._rows(value, parameter) if is_cut and value.dim() else value).to(device, copy=True)
                for key, value in parts.items()
            }
        )

    def _cut(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor):
            return whole
        local = self._rows(whole, parameter).to(parameter.device, copy=True)
        return DTensor.from_local(
            local,
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
