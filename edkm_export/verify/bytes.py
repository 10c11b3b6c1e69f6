"""Bit equality between the checkpoint and what lies on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.artifact.protocol import StoredModel
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import PackageError
from edkm_export.verify.report import Rung, Verdict

__all__ = ["compare_bytes"]


def compare_bytes(checkpoint: Checkpoint, artifact: StoredModel) -> tuple[Rung, dict[str, bool]]:
    """Compare every parameter with the artifact.

    Args:
        checkpoint: what should be there.
        artifact: what was read from disk.

    Returns:
        The rung, and {palettized parameter: equal bit for bit}.
    """
    names: dict[str, Any] = {
        "id": "bytes",
        "reference": "hard PyTorch",
        "candidate": "decoded artifact (bytes on disk)",
        "threshold": "every index and every LUT entry equal, every other parameter equal in float16, none left dense",
        "why": "conversion moves bits, it computes nothing: there is no tolerance to give",
    }
    try:
        palettized, dense = artifact.palettized(), artifact.dense()
    except PackageError as error:
        return Rung(**names, verdict=Verdict.FAIL, detail=str(error)), {}

    exact = {
        name: name in palettized and tensor.same_bits(palettized[name])
        for name, tensor in tracked(checkpoint.palettized.items(), "comparing", "weights")
    }
    faults = [
        f"{name} {'differs' if name in palettized else 'is dense' if name in dense else 'is missing'}"
        for name, equal in exact.items()
        if not equal
    ]
    faults += [f"{name} should not be palettized" for name in palettized if name not in checkpoint.palettized]
    elided = 0
    for name, tensor in checkpoint.dense.items():
        if name not in dense:
            # The converter drops a product with ones and a bias of zeros, which changes nothing.
            if bool((tensor == (0 if name.endswith("bias") else 1)).all()):
                elided += 1
            else:
                faults.append(f"{name} is missing")
        elif not _same_half(tensor, dense[name]):
            faults.append(f"{name} differs")
    equal = sum(exact.values())
    others = len(checkpoint.dense)
    detail = f"{equal} of {len(exact)} palettized tensors bit-exact, {others} others compared"
    if elided:
        detail += f" ({elided} of ones or zeros left out by the converter)"
    if faults:
        some = ", ".join(faults[:5]) + (", ..." if len(faults) > 5 else "")
        detail += f"; {len(faults)} fault{'s' if len(faults) > 1 else ''}: {some}"
    measures = {"bit_exact": equal, "palettized": len(exact), "dense": others, "faults": faults}
    return Rung(
        **names, verdict=Verdict.FAIL if faults else Verdict.PASS, detail=detail, measures=measures
    ), exact


def _same_half(expected: Tensor, found: Tensor) -> bool:
    """Equal bits after rounding to float16. The program may have given the tensor further axes of size one."""
    half = expected.half().contiguous().reshape(-1)
    other = found.half().contiguous().reshape(-1)
    return half.shape == other.shape and torch.equal(half.view(torch.int16), other.view(torch.int16))
