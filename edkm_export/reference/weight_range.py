"""The values that an export can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edkm_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_weight", "check_weight_range"]

_FLOAT16_LIMIT = 65504.0


def check_weight_range(model: Any, reference: str) -> None:
    """Every export computes in float16: a weight beyond it would become infinity there.

    Args:
        model: of transformers, any dtype.
        reference: what the user gave as MODEL.

    Raises:
        InputError: a parameter holds NaN, infinity, or a value beyond 65,504.
    """
    for name, parameter in model.named_parameters():
        check_weight(name, parameter.data, reference)


def check_weight(name: str, weight: Tensor, reference: str) -> None:
    """The same for one parameter.

    Raises:
        InputError: see `check_weight_range`.
    """
    import torch

    least, most = (float(each) for each in torch.aminmax(weight))
    extreme = most if abs(most) >= abs(least) else least
    if not abs(least) + abs(most) < float("inf"):
        raise InputError(f"{reference}: {name} holds NaN or infinity; the model is broken.")
    if abs(extreme) > _FLOAT16_LIMIT:
        raise InputError(
            f"{reference}: {name} holds {extreme:,.9g}, beyond {_FLOAT16_LIMIT:,.0f}, the largest float16 "
            "value, and lookup tables are float16; scale this weight down in the model, or mend it."
        )
