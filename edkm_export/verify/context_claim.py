"""The rung of the context: how many positions an artifact says that it can hold."""

from __future__ import annotations

from typing import Any

from edkm_export.artifact.execution import AT_FAULT, DAMAGED
from edkm_export.artifact.protocol import Artifact, Reaching
from edkm_export.verify.report import Rung, Verdict

__all__ = ["check_context", "context_rung"]


def check_context(artifact: Artifact, positions: int) -> Rung:
    """Test what an artifact says of its context.

    Args:
        artifact: as read from disk.
        positions: for which the model of the checkpoint was made.
    """
    claimed = getattr(artifact, "claimed_context", None)
    if claimed is None or claimed > positions or not isinstance(artifact, Reaching):
        return context_rung(claimed, positions)
    try:
        artifact.reach(claimed)
    except AT_FAULT as error:
        return context_rung(claimed, positions, str(error))
    return context_rung(claimed, positions)


def context_rung(claimed: int | None, positions: int, fault: str = "") -> Rung:
    """The claim against the model; `claimed` is None where there is none, `fault` says why the last cannot be had."""
    names: dict[str, Any] = {
        "id": "context",
        "reference": "configuration",
        "candidate": "positions that the artifact says it holds",
        "threshold": "no more than the model was made for, and the last of them can be had",
        "why": "an app that believes the claim would feed longer texts than can be computed",
    }
    if claimed is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=f"no claim: none is made, or {DAMAGED}")
    detail = f"{claimed:,} positions claimed, the model has {positions:,}"
    if fault:
        detail = f"{claimed:,} positions claimed, but {fault}"
    return Rung(
        **names,
        verdict=Verdict.FAIL if fault or claimed > positions else Verdict.PASS,
        detail=detail,
        measures={"claimed_positions": claimed, "model_positions": positions},
    )
