"""A number that tells whether tensors have changed, for changes that version counters do not count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["fingerprint"]

_BLOCK = 1 << 20  # entries that are widened at a time
_PRIME = 1_099_511_628_211  # sets blocks apart
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2**62, (_BLOCK,), generator=generator) * 2 + 1).to(device)


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Hash the bits of tensors: a sum of all entries, each times a random odd number, modulo 2**64.

    That any given change leaves it as it was has a chance of about 2**-60. On a GPU the host waits for it.
    """
    found = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).view(-1)
        for block in torch.split(bits, _BLOCK):
            found = found * _PRIME + (block * _factors(block.device)[: len(block)]).sum()
    return int(found)
