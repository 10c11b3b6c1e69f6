"""What devices are known to do with a model, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edkm_export.device_lint import Finding

__all__ = ["show_findings", "warn_of"]


def show_findings(findings: Sequence[Finding]) -> None:
    """Print all of them as a table."""
    from rich.table import Table

    from edkm_export.cli.console import out

    if not findings:
        out.print("device lint: nothing found")
        return
    lines = Table(title="device lint", title_justify="left")
    for heading in ("finding", "reason", "remedy", "source"):
        lines.add_column(heading)
    for finding in findings:
        subject = f"{finding.severity}: {finding.id}\n{finding.subject}"
        lines.add_row(subject, finding.reason, finding.remedy, finding.source)
    out.print(lines)


def warn_of(findings: Sequence[Finding]) -> None:
    """Print those that are more than notes, a line each."""
    from edkm_export.cli.console import err

    for finding in findings:
        if finding.severity != "note":
            err.print(
                f"{finding.severity}: {finding.subject}: {finding.reason} {finding.remedy} ({finding.source})",
                soft_wrap=True,
                highlight=False,
            )
