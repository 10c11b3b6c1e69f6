"""Token ids in whatever form a caller has them: a list, a numpy array, a tensor, or what a tokenizer gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from edkm_export.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Ids", "as_ids"]

Ids = Union[Tensor, Sequence[int], "NDArray[np.integer[Any]]", Mapping[str, Any]]
"""Ids of one text: a tensor, a numpy array, a sequence of integers, or what a tokenizer gave."""

_LARGEST = 2**63 - 1


def as_ids(ids: Ids, where: str = "ids") -> Tensor:
    """Token ids of one text as a tensor.

    Args:
        ids: a tensor or numpy array of any integer dtype, [tokens] or [1, tokens]; a list, tuple or range of integers,
            or a list that holds one such list; or what a tokenizer of transformers gave, with "input_ids".
        where: whose ids they are, for messages.

    Returns:
        int64 [tokens], on the CPU; the tensor itself where it is one already.

    Raises:
        InputError: there are none, they are not integers, or they are more than one text.

    Example:
        >>> as_ids([[1, 2, 3]])
        tensor([1, 2, 3])
    """
    if isinstance(ids, Mapping):
        if "input_ids" not in ids:
            raise InputError(f"{where}: a mapping without 'input_ids'; it has {', '.join(map(str, ids))}.")
        ids = ids["input_ids"]
    found = ids if isinstance(ids, Tensor) else _tensor(ids, where)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise InputError(f"{where}: ids are {found.dtype} {list(found.shape)}, expected integers.")
    if found.dim() == 2 and len(found) == 1:
        found = found[0]
    if found.dim() != 1:
        raise InputError(
            f"{where}: ids have shape {list(found.shape)}, expected [tokens]: one text, without padding."
        )
    if not len(found):
        raise InputError(f"{where}: there are no ids; give at least one.")
    return found.detach().to("cpu", torch.int64)


def _tensor(ids: Any, where: str) -> Tensor:
    """Integers of Python or numpy."""
    if isinstance(ids, (str, bytes)):
        raise InputError(
            f"{where}: is text, expected token ids; a tokenizer makes them: tokenizer(text).input_ids."
        )
    if hasattr(ids, "__array__"):
        import numpy as np

        array = np.asarray(ids)
        if array.dtype.kind not in "iu" and array.size:
            raise InputError(f"{where}: ids are {array.dtype} {list(array.shape)}, expected integers.")
        if array.dtype == np.uint64 or not array.size:
            array = array.astype(
                np.int64
            )  # what was beyond it becomes negative, and no vocabulary holds that
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if not isinstance(ids, Iterable):
        raise InputError(
            f"{where}: ids are {type(ids).__name__}, expected a list, an array or a tensor of integers."
        )
    items = list(ids)
    if len(items) > 1 and all(isinstance(item, Sequence) and not isinstance(item, str) for item in items):
        raise InputError(f"{where}: {len(items)} lists of ids; give one text at a time.")
    if len(items) == 1 and not _is_integer(items[0]) and isinstance(items[0], Iterable):
        nested: Any = items[0]
        return as_ids(nested, where)
    for place, item in enumerate(items):
        if not _is_integer(item):
            raise InputError(f"{where}: item {place} is {item!r:.40}, expected an integer.")
        if abs(int(item)) > _LARGEST:
            raise InputError(f"{where}: id {int(item)} is no token.")
    return torch.tensor([int(item) for item in items], dtype=torch.int64)


def _is_integer(value: Any) -> bool:
    """An int of Python or numpy, or a tensor of one; a bool is none."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return not isinstance(value, bool) and hasattr(value, "__index__") and not hasattr(value, "__len__")
