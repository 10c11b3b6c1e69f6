"""What the commands share on the terminal: consoles, progress and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from edkm_export.activity import activity, stages
from edkm_export.cli.terminal import Terminal

if TYPE_CHECKING:  # importing it takes a while, which a refusal must not wait for
    from edkm_export.verify.report import Report, Verdict

__all__ = [
    "bar",
    "err",
    "fault_lines",
    "ladder_table",
    "megabytes",
    "out",
    "print_report",
    "print_wide",
    "stages",
    "summary_line",
    "summary_table",
    "verdict_text",
]

out = Terminal()
err = Terminal(stderr=True)

_STYLES = {
    "PASS": "bold green",
    "FAIL": "bold red",
    "WITHIN": "bold green",
    "BEYOND": "bold red",
    "REPORTED": "blue",
    "NOT RUN": "yellow",
}


@contextlib.contextmanager
def bar(description: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show how far something has come; yields the function that advances it. See `edkm_export.activity`."""
    with activity(description, total, unit) as counted:
        yield counted.advance


def print_wide(table: Table) -> None:
    """Print a table so that nothing of it is lost, whatever the width of the terminal."""
    out.print(table)


def megabytes(size_bytes: float) -> str:
    """1 MB is 10**6 bytes, as app stores count."""
    return f"{size_bytes / 1e6:,.1f} MB"


def verdict_text(verdict: Verdict) -> Text:
    """The verdict in its colour."""
    return Text(verdict.value, style=_STYLES[verdict.value])


def _verdict(verdict: Verdict, words: str) -> Text:
    return Text.assemble(verdict_text(verdict), ": ", words)


def summary_table(report: Report) -> Table:
    """The table that a person reads in ten seconds."""
    from edkm_export.verify.verdicts import budget_words, faithful_words, memory_words, quality_words, tally
    from edkm_export.verify.words import counts_words, readable

    table = Table(title=report.artifact, title_justify="left", show_header=False)
    table.add_row("faithful export", _verdict(report.faithful_export, faithful_words(report)))
    table.add_row("quality", _verdict(report.quality, quality_words(report)))
    if report.top1_agreement is not None:
        table.add_row("top-1 agreement", f"{report.top1_agreement:.1%} of positions, with the original")
    if (nearness := report.nearness) is not None:
        order = f"{nearness['rank_agreement']:.1%} of pairs of documents in the same order"
        table.add_row(
            "rank agreement", f"{order}, {nearness['same_nearest']:.1%} same nearest, with the original"
        )
    table.add_row("size", f"{megabytes(report.size_bytes)} (float16: {megabytes(report.parameters * 2)})")
    table.add_row("bits a weight", f"{report.bits_per_weight:.2f}, LUTs and unpalettized weights included")
    table.add_row("bit-exact tensors", f"{report.bit_exact_tensors} of {len(report.tensors)}")
    for name, found in report.perplexities.items():
        table.add_row(f"perplexity, {readable(name)}", f"{found.value:.2f} ± {found.standard_error:.2f}")
    for one in report.tasks:
        table.add_row(f"task, {one.task}", counts_words(one))
    table.add_row("comparisons", tally(report))
    if report.time_budget is not None:
        table.add_row("time budget", budget_words(report.time_budget))
    if report.memory is not None:
        table.add_row("memory", memory_words(report.memory))
    return table


def ladder_table(report: Report) -> Table:
    """Each rung with its verdict."""
    table = Table(title="verification ladder", title_justify="left")
    table.add_column("checked")
    table.add_column("verdict", no_wrap=True)
    table.add_column("found")
    for rung in report.rungs:
        table.add_row(rung.candidate, verdict_text(rung.verdict), rung.detail)
    return table


def print_report(report: Report) -> None:
    """The two tables of a verification, and the words that the second one needs."""
    from edkm_export.verify.words import FIRST_WORDS

    out.print(summary_table(report))
    out.print(f"Words of the ladder: {FIRST_WORDS}.", soft_wrap=True)
    out.print(ladder_table(report))


def summary_line(report: Report) -> str:
    """Both verdicts, artifact, and what failed or what was proved, in one line."""
    from edkm_export.verify.verdicts import one_line

    return one_line(report)


def fault_lines(report: Report) -> list[str]:
    """Where an execution goes wrong, as localization found it."""
    lines = []
    for fault in report.faults:
        if fault.module:
            lines.append(f"first fault: {fault.module}, {fault.op}")
            lines.append(
                f"  {fault.what}: relative error {fault.error:.2g}, at most {fault.tolerance:.2g} is allowed"
            )
        else:
            lines.append(f"first fault: not found; {fault.what}")
    return lines
