"""The longest silence of each command, in a terminal and in a pipe.

    python -m benchmarks.silence MODEL [--calibration FILE] [--json FILE]

runs `edkm-export` on a model and notes when bytes arrive: from a pseudo-terminal, and from a pipe that holds both
standard output and standard error. Silence is the longest time without a new byte, from the start of the process to
its end.
"""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from converters.coreai.backend import missing_backend

_TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
_ASIDE = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "CI")  # they decide what a terminal is taken for


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        command: name of the command, and the format where several are tried.
        where: "terminal" or "pipe".
        status: exit status.
        seconds: of the whole run.
        longest_s: longest silence.
        at_s: when it began.
        before: the last of what was printed before it.
    """

    command: str
    where: str
    status: int
    seconds: float
    longest_s: float
    at_s: float
    before: str


def measure(arguments: list[str], where: str, name: str) -> Measured:
    """Run a command, and listen to it."""
    command = [sys.executable, "-m", "edkm_export", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in _ASIDE} | _TERMINAL
    reader, writer = pty.openpty() if where == "terminal" else os.pipe()
    started = last = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=environment, close_fds=True
    )
    os.close(writer)
    longest, at, before, tail = 0.0, 0.0, "", b""
    while True:
        ready, _, _ = select.select([reader], [], [], 0.1)
        if not ready:
            continue
        try:
            data = os.read(reader, 1 << 16)
        except OSError:  # how a pseudo-terminal ends
            data = b""
        now = time.monotonic()
        if now - last > longest:
            longest, at, before = now - last, last - started, tail.decode(errors="replace")
        last = now
        if not data:
            break
        tail = (tail + data)[-200:]
    os.close(reader)
    status = process.wait()
    line = (before.strip().splitlines() or [""])[-1][-80:]
    return Measured(name, where, status, now - started, longest, at, line)


def jobs(model: str, folder: Path, calibration: Path) -> Iterator[list[str]]:
    """Each command, on what the one before has made."""
    made = folder / "model.pt"
    formats = ["coreml", "onnx"] + ([] if missing_backend() else ["coreai"])
    story = ["--prompt", "Once upon a time", "--max-new-tokens", "24"]
    yield ["doctor", model]
    yield ["inspect", model]
    yield ["palettize", model, "--calibration", str(calibration), "-o", str(made)]
    for name in formats:
        yield [name, str(made), "-o", str(folder / name)]
    for name in formats:
        yield ["verify", str(made), str(folder / name)]
        yield ["generate", str(folder / name), *story]
    yield ["compare", str(made), *(str(folder / name) for name in formats)]
    yield [
        "train", model, "--data", str(calibration), "--bits", "4", "--context", "128", "--batch-size", "1",
        "--steps", "4", "-o", str(folder / "run"),
    ]  # fmt: skip


def named(arguments: list[str], folder: Path) -> str:
    """The command, and the format when it is one of several."""
    formats = [
        Path(each).name for each in arguments[1:] if Path(each).parent == folder and not Path(each).suffix
    ]
    return arguments[0] + (f" ({formats[0]})" if arguments[0] in ("verify", "generate") else "")


@click.command()
@click.argument("model")
@click.option("--calibration", type=click.Path(path_type=Path), default=Path("fixtures/calibration.txt"))
@click.option("--only", multiple=True, help="Only this command, and what it needs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here, too.")
def main(model: str, calibration: Path, only: tuple[str, ...], json_file: Path | None) -> None:
    """Print a table of the longest silences."""
    found: list[Measured] = []
    for where in ("terminal", "pipe"):
        folder = Path(tempfile.mkdtemp(prefix="silence"))
        try:
            for arguments in jobs(model, folder, calibration):
                name = named(arguments, folder)
                if only and arguments[0] not in only and name not in only:
                    continue
                one = measure(arguments, where, name)
                found.append(one)
                click.echo(
                    f"{one.command:17} {one.where:8} {one.longest_s:6.1f} s silent of {one.seconds:6.1f} s, from "
                    f"{one.at_s:.1f} s on, after {one.before!r}"
                    + (f"; exit status {one.status}: {shlex.join(arguments)}" if one.status else "")
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    click.echo()
    click.echo("| command | seconds | longest silence, terminal | longest silence, pipe |")
    click.echo("|---|---|---|---|")
    half = len(found) // 2
    for terminal, piped in zip(found[:half], found[half:], strict=True):
        click.echo(
            f"| `{terminal.command}` | {terminal.seconds:.0f} | {terminal.longest_s:.1f} s | {piped.longest_s:.1f} s |"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
