"""What the commands share on the terminal: consoles, progress and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from edkm_export.verify.report import Report, Verdict
from edkm_export.verify.verdicts import budget_words, faithful_words, one_line, quality_words, tally
from edkm_export.verify.words import FIRST_WORDS, readable

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

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_STYLES = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.WITHIN: "bold green",
    Verdict.BEYOND: "bold red",
    Verdict.REPORTED: "blue",
    Verdict.NOT_RUN: "yellow",
}


@contextlib.contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields the function that advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=not err.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextlib.contextmanager
def stages(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over named stages; yields the function that announces the next one."""
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("starting", total=total, completed=-1)

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if not err.is_terminal:
                err.print(f"- {name}", markup=False)

        yield advance


def print_wide(table: Table) -> None:
    """Print a table at its full width, for the terminal to wrap: names that are cut are of no use."""
    width = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    Console(highlight=False, width=max(out.width, width)).print(table)


def megabytes(size_bytes: float) -> str:
    """1 MB is 10**6 bytes, as app stores count."""
    return f"{size_bytes / 1e6:,.1f} MB"


def verdict_text(verdict: Verdict) -> Text:
    """The verdict in its colour."""
    return Text(verdict.value, style=_STYLES[verdict])


def _verdict(verdict: Verdict, words: str) -> Text:
    return Text.assemble(verdict_text(verdict), "  ", words)


def summary_table(report: Report) -> Table:
    """The table that a person reads in ten seconds."""
    table = Table(title=report.artifact, title_justify="left", show_header=False)
    table.add_row("faithful export", _verdict(report.faithful_export, faithful_words(report)))
    table.add_row("quality", _verdict(report.quality, quality_words(report)))
    if report.top1_agreement is not None:
        table.add_row("top-1 agreement", f"{report.top1_agreement:.1%} of positions, with the original")
    table.add_row("size", f"{megabytes(report.size_bytes)} (float16: {megabytes(report.parameters * 2)})")
    table.add_row("bits a weight", f"{report.bits_per_weight:.2f}, LUTs and unpalettized weights included")
    table.add_row("bit-exact tensors", f"{report.bit_exact_tensors} of {len(report.tensors)}")
    for name, found in report.perplexities.items():
        table.add_row(f"perplexity, {readable(name)}", f"{found.value:.2f} ± {found.standard_error:.2f}")
    table.add_row("comparisons", tally(report))
    if report.time_budget is not None:
        table.add_row("time budget", budget_words(report.time_budget))
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
    out.print(summary_table(report))
    out.print(f"Words of the ladder: {FIRST_WORDS}.", soft_wrap=True)
    out.print(ladder_table(report))


def summary_line(report: Report) -> str:
    """Both verdicts, artifact, and what failed or what was proved, in one line."""
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
