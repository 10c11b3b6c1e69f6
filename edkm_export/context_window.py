"""What may be fed to a model whose cache holds so many positions."""

from __future__ import annotations

import torch
from torch import Tensor

from edkm_export.errors import InputError

__all__ = ["require_room"]


def require_room(tokens: Tensor, used: int, context: int, vocab_size: int, where: str) -> None:
    """Check what a session is fed.

    Args:
        tokens: int64 [new].
        used: positions that its cache holds.
        context: positions that it can hold.
        vocab_size: size of its vocabulary.
        where: the model, for messages.

    Raises:
        InputError: no tokens, too many, or one outside the vocabulary.
    """
    if tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens):
        raise InputError(f"{where}: tokens are {tokens.dtype} {list(tokens.shape)}, expected int64 [new].")
    if used + len(tokens) > context:
        raise InputError(
            f"{where}: its context holds {context} positions; {used} are taken, {len(tokens)} more do not fit."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"{where}: token {wrong} is outside its vocabulary of {vocab_size}.")
