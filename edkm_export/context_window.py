"""What may be fed to a model whose cache holds so many positions."""

from __future__ import annotations

from torch import Tensor

from edkm_export.errors import InputError
from edkm_export.token_ids import Ids, as_ids

__all__ = ["require_room"]


def require_room(tokens: Ids, used: int, context: int, vocab_size: int, where: str) -> Tensor:
    """Check what a session is fed.

    Args:
        tokens: ids in any form that `as_ids` takes.
        used: positions that its cache holds.
        context: positions that it can hold.
        vocab_size: size of its vocabulary.
        where: the model, for messages.

    Returns:
        int64 [new].

    Raises:
        InputError: no tokens, no integers, too many, or one outside the vocabulary.
    """
    found = as_ids(tokens, where)
    if used + len(found) > context:
        raise InputError(
            f"{where}: its context holds {context} positions; {used} are taken, {len(found)} more do not fit."
        )
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"{where}: token {wrong} is outside its vocabulary of {vocab_size}.")
    return found
