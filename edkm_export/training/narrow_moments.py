"""AdamW whose moments of the weights take two bytes or one instead of four, by torchao's optimizers.

One-byte moments are those of Dettmers et al. 2022 (arXiv 2110.02861): blocks of 256 values share a scale, and a byte
picks one of 256 levels that lie closer together near zero. torchao compiles the step of each shape, and takes ordinary
tensors alone; here it gets the rows that a process holds, whatever the parameter is around them. Blocks are therefore
those of a process's own rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.errors import BackendMissingError
from edkm_export.training.distributed.sharded_clusters import plain

__all__ = ["NarrowMoments", "joined", "parts_of"]

_CODES, _SCALE = ".codes", ".scale"  # of a moment in one byte, behind its name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchao's complaints of kernels for other processors, which are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _library() -> Any:
    try:
        with _quiet():
            import torchao.optim
    except ImportError as error:
        raise BackendMissingError(
            "--moments and --masters need torchao: pip install 'edkm-export[moments]'"
        ) from error
    return torchao.optim


class NarrowMoments(torch.optim.Optimizer):
    """AdamW without decay. Groups that are `narrow` have narrow moments, all others float32 ones.

    Weights in bfloat16 are rounded stochastically, up or down by the chance that keeps them where they are on average;
    changes that are smaller than their last digit would be lost otherwise.

    Args:
        groups: as of any optimizer, with "narrow" in each.
        moments: of the narrow groups: "float32", "bfloat16" or "8bit".
        betas: of Adam.
        on_cuda: whether the parameters are on CUDA, where the step is compiled.

    Raises:
        BackendMissingError: torchao is not installed.
    """

    def __init__(
        self, groups: list[dict[str, Any]], moments: str, betas: tuple[float, float], *, on_cuda: bool
    ) -> None:
        self._kind, self._on_cuda = _class_of(moments), on_cuda
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self._empty = self._kind([torch.zeros(1)])  # what makes new moments
        self._inner: list[torch.optim.Optimizer] | None = None
        self._rows: dict[Tensor, nn.Parameter] = {}

    def _build(self) -> list[torch.optim.Optimizer]:
        """An optimizer of plain tensors for each group; made when parameters are where they will stay."""
        found: list[torch.optim.Optimizer] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                self._rows[parameter] = nn.Parameter(plain(parameter.detach()), requires_grad=False)
            rows = [self._rows[parameter] for parameter in group["params"]]
            settings = {key: group[key] for key in ("betas", "eps", "weight_decay")}
            if group["narrow"]:
                inner = self._kind(rows, lr=float(group["lr"]), bf16_stochastic_round=True, **settings)
            else:
                inner = torch.optim.AdamW(rows, lr=float(group["lr"]), fused=self._on_cuda, **settings)
            for parameter, own in zip(group["params"], rows, strict=True):
                state = self.state[parameter]
                if state and group["narrow"]:
                    state["step"] = state["step"].cpu()  # as torchao holds it
                inner.state[own] = state  # one dictionary for both
            found.append(inner)
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        if self._inner is None:
            self._inner = self._build()
        stance = contextlib.nullcontext() if self._on_cuda else torch.compiler.set_stance("force_eager")
        for group, inner in zip(self.param_groups, self._inner, strict=True):
            rate = inner.param_groups[0]["lr"]
            if isinstance(rate, Tensor):
                rate.fill_(float(group["lr"]))
            else:
                inner.param_groups[0]["lr"] = float(group["lr"])
            for parameter in group["params"]:
                own = self._rows[parameter]
                own.data = plain(parameter.detach())
                own.grad = None if parameter.grad is None else plain(parameter.grad)
            with stance:
                inner.step()
            for parameter in group["params"]:
                self._rows[parameter].grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, in plain tensors."""
        found = super().state_dict()
        state = {
            number: {
                f"{key}{part}": tensor
                for key, value in own.items()
                for part, tensor in parts_of(value).items()
            }
            for number, own in found["state"].items()
        }
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave; moments keep their dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, values in state_dict["state"].items():
            device = plain(held[number]).device
            moved = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()
            }
            self.state[held[number]] = joined(moved)
        self._inner = None

    def restore(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Take over the state of a parameter's rows; moments that were stored by their values are made narrow again."""
        is_narrow = any(
            group["narrow"] and any(parameter is each for each in group["params"])
            for group in self.param_groups
        )
        if is_narrow:
            own = plain(parameter.detach())
            for key in ("exp_avg", "exp_avg_sq"):
                made = self._empty._new_buffer(own, key == "exp_avg")
                if type(made) is not type(state[key]) and not hasattr(state[key], "codes"):
                    made.copy_(state[key])  # levels and scales of what was rounded already are found again
                    state[key] = made
        self.state[parameter] = state
        self._inner = None


def _class_of(moments: str) -> Any:
    library = _library()
    if moments == "8bit":
        return library.AdamW8bit

    dtype = torch.bfloat16 if moments == "bfloat16" else torch.float32

    class Plain(library.AdamW8bit):  # type: ignore[misc, name-defined]
        """The same step; a moment is decayed in float32 and rounded once."""

        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            return torch.zeros_like(p, dtype=dtype)

    return Plain


def parts_of(value: Any, *, by_rows: bool = False) -> dict[str, Any]:
    """A value of an optimizer's state as plain tensors, by what follows its name.

    A moment in one byte has codes [rows, ...] and scales [rows, blocks of a row]; where blocks are not parts of rows,
    scales [blocks, 1], or with `by_rows` the values themselves: these can be cut between any two rows.
    """
    if not hasattr(value, "codes"):
        return {"": value}
    rows = value.codes.shape[0]
    if value.scale.numel() % rows == 0:
        return {_CODES: value.codes, _SCALE: value.scale.view(rows, -1)}
    return {"": value.dequantize()} if by_rows else {_CODES: value.codes, _SCALE: value.scale[:, None]}


def joined(parts: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter from its parts by name, see `parts_of`."""
    found = {key: value for key, value in parts.items() if not key.endswith((_CODES, _SCALE))}
    for key, codes in parts.items():
        if key.endswith(_CODES):
            name = key.removesuffix(_CODES)
            from torchao.optim.subclass_8bit import OptimState8bit

            scale = parts[f"{name}{_SCALE}"].reshape(-1)
            made = OptimState8bit.zeros(
                codes.shape, name == "exp_avg", codes.numel() // scale.numel(), codes.device
            )
            made.codes.copy_(codes)
            made.scale.copy_(scale)
            found[name] = made
    return found
