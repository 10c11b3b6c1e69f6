"""The rung on which a program that is not ours decodes the palettes on disk."""

from __future__ import annotations

from typing import Any

import torch

from edkm_export.artifact.protocol import Artifact, Decoding
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import PackageError
from edkm_export.verify.report import Rung, Verdict

__all__ = ["compare_decoding"]


def compare_decoding(checkpoint: Checkpoint, artifact: Artifact) -> Rung | None:
    """Compare every palettized weight, as that program decodes it, with `PalettizedTensor.decode`.

    Args:
        checkpoint: what should be there.
        artifact: what was read from disk.

    Returns:
        None when there is no such program for the artifact's format.
    """
    if not isinstance(artifact, Decoding):
        return None
    names: dict[str, Any] = {
        "id": "decoding",
        "reference": "hard PyTorch",
        "candidate": f"palettes decoded by {artifact.decoder_name}",
        "threshold": "every weight equal bit for bit",
        "why": "our reader and our writer could be wrong alike; this decoder is not ours",
    }
    if artifact.decoder_missing:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=artifact.decoder_missing)
    equal, wrong = 0, []
    try:
        for name, weight in artifact.decoded_elsewhere():
            expected = checkpoint.palettized.get(name)
            if expected is not None and torch.equal(
                expected.decode().view(torch.int16), weight.contiguous().view(torch.int16)
            ):
                equal += 1
            else:
                wrong.append(name)
    except PackageError as error:
        return Rung(**names, verdict=Verdict.FAIL, detail=str(error))
    count = len(checkpoint.palettized)
    detail = f"{equal} of {count} weights equal bit for bit"
    if wrong:
        detail += f"; {len(wrong)} differ: {', '.join(wrong[:5])}"
    verdict = Verdict.PASS if equal == count and not wrong else Verdict.FAIL
    return Rung(**names, verdict=verdict, detail=detail, measures={"equal": equal, "palettized": count})
