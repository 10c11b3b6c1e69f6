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
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from edkm_export.verify.report import Report, Verdict

__all__ = [
    "Stages",
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


class Stages:
    """Called with the name of the next stage.

    Args:
        progress: the bar.
        task: its only one.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task, self._name = progress, task, ""

    def __call__(self, name: str) -> None:
        """Announce a stage."""
        self._name = name
        self._progress.update(self._task, advance=1, description=name)
        if not err.is_terminal:
            err.print(f"- {name}", markup=False)

    def loading(self, share: float) -> None:
        """Show how much of a model is read within the stage, 0 to 1."""
        read = f", {share:.0%} of it read" if share < 1 else ""
        self._progress.update(self._task, description=f"{self._name}{read}")


@contextlib.contextmanager
def stages(total: int) -> Iterator[Stages]:
    """A bar over named stages; yields what announces the next one."""
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield Stages(progress, progress.add_task("starting", total=total, completed=-1))


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


def summary_table(report: Report) -> Table:
    """The table that a person reads in ten seconds."""
    table = Table(title=report.artifact, title_justify="left", show_header=False)
    table.add_row("size", f"{megabytes(report.size_bytes)} (float16: {megabytes(report.parameters * 2)})")
    table.add_row("bits a weight", f"{report.bits_per_weight:.2f}, LUTs and unpalettized weights included")
    table.add_row("bit-exact tensors", f"{report.bit_exact_tensors} of {len(report.tensors)}")
    for name, found in report.perplexities.items():
        table.add_row(f"perplexity, {name}", f"{found.value:.2f} ± {found.standard_error:.2f}")
    table.add_row("verdict", verdict_text(report.verdict))
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
    """The two tables of a verification."""
    out.print(summary_table(report))
    out.print(ladder_table(report))


def summary_line(report: Report) -> str:
    """Verdict, artifact, and what failed or what was proved, in one line."""
    failed = [f"{rung.candidate}: {rung.detail}" for rung in report.rungs if rung.verdict is Verdict.FAIL]
    if failed:
        found = "; ".join(failed)
    else:
        passed = sum(rung.verdict is Verdict.PASS for rung in report.rungs)
        judged = sum(rung.verdict is not Verdict.REPORTED for rung in report.rungs)
        found = (
            f"{report.bit_exact_tensors} of {len(report.tensors)} tensors bit-exact, "
            f"{passed} of {judged} rungs passed, {len(report.not_run)} not run"
        )
    return " ".join(f"{report.verdict.value} {report.artifact}: {found}".split())


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
