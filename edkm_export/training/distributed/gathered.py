"""What FSDP2 moves for a palettized weight: its indices, one byte a weight, instead of its master weight.

The forward pass of palettized training needs no master weight, so that it can stay in shares. FSDP2 lets a
parameter say what is gathered for it (`fsdp_pre_all_gather`, `fsdp_post_all_gather`; torch.distributed.fsdp,
"extensions"; float8 training uses them to gather 8-bit weights). The gradient is reduced and scattered as for
any other parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Gathered", "Master"]

_aten = torch.ops.aten
# With these FSDP2 cuts a parameter into shares and wraps them; results of all others are plain tensors.
_STAYS_MASTER = {
    _aten.detach.default,
    _aten.slice.Tensor,
    _aten.view.default,
    _aten.split.Tensor,
    _aten.new_zeros.default,
    _aten.as_strided.default,
}
_STAYS_GATHERED = {_aten.detach.default, _aten.alias.default, _aten.as_strided.default}


class Master(Tensor):
    """A share of a master weight, in the shape of its rows; its module is a `ShardedClusters`."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> Master:  # noqa: D102
        made: Master = Tensor._make_wrapper_subclass(
            cls, plain.shape, strides=plain.stride(), dtype=plain.dtype, device=plain.device
        )
        made.plain = plain
        return made

    def __repr__(self, **_kwargs: Any) -> str:  # type: ignore[override]
        return f"Master({self.plain})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = pytree.tree_map_only(cls, lambda each: each.plain, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, cls, found) if func in _STAYS_MASTER else found

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What this process contributes: rows of indices, padded to the same number in each process."""
        return (module.contribution(),), outer_size

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: torch.Size,
        param_dtype: torch.dtype,
        *,
        out: Any = None,
    ) -> Any:
        """The unsharded parameter, or None when `out` is one that is to be used again."""
        rows = all_gather_outputs[0][: metadata[0]]
        if out is None:
            return Gathered(rows, metadata, param_dtype), all_gather_outputs
        out.rows = rows
        return None


class Gathered(Tensor):
    """Stands for a whole master weight in autograd: its shape, dtype and gradient, but indices for its values.

    Attributes:
        rows: what was gathered: indices uint8 [out, in, ...] of all processes; with "dkm" the soft weight itself.
    """

    rows: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, shape: torch.Size, dtype: torch.dtype) -> Gathered:  # noqa: D102
        made: Gathered = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows.device)
        made.rows = rows
        return made

    def __repr__(self, **_kwargs: Any) -> str:  # type: ignore[override]
        return f"Gathered({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _STAYS_GATHERED:
            return cls(args[0].rows, args[0].shape, args[0].dtype)
        raise NotImplementedError(f"{func}: master weights are not gathered, only their indices are.")
