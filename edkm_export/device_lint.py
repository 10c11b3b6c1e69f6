"""What devices are known to do with a model, in words: found by each format's `lint`, told by cards and commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edkm_export.escaping import for_markdown

__all__ = ["Finding", "card_sections", "worst_first"]

_SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that a device is known, or not known, to do.

    Attributes:
        id: stable name.
        severity: "error": does not load, or computes wrong numbers; "warning": falls off the Neural Engine, or is
            reported to fail for some; "note": worth knowing.
        subject: what it is about.
        reason: what happens.
        source: where that is known from.
        remedy: what to do.
    """

    id: str
    severity: Literal["error", "warning", "note"]
    subject: str
    reason: str
    source: str
    remedy: str


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sorted by severity."""
    return sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity))


def card_sections(findings: Sequence[Finding]) -> dict[str, str]:
    """What a model card says of them, {heading: Markdown}; empty without any."""
    if not findings:
        return {}
    lines = [
        f"- **{finding.id}** ({finding.severity}), {for_markdown(finding.subject)}: {finding.reason} "
        f"Remedy: {finding.remedy}. Source: {finding.source}."
        for finding in findings
    ]
    return {"What devices are known to do": "\n".join(lines)}
