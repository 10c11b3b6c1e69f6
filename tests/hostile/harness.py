"""Runs one hostile input in a process of its own, with a deadline and a limit of memory, and says what it did wrong.

The process is a fork of one that has imported everything, so that a case takes milliseconds. What a command may end
with is 0, 1 or 2; a signal, a traceback, a hang, memory beyond its own size and a gigabyte, a process, a connection or
a file outside of its folder, and control characters on the terminal are faults.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["Outcome", "Step", "command", "run_case"]

DEADLINE_S = 20.0
"""Of processor time for all steps of a case; three times as long on the clock, since other processes run too."""

_SLACK_BYTES = 1 << 30
_HARD_BYTES = 6 << 30  # of address space beyond that of the parent: a fault must not take the machine with it
_ALLOWED = (0, 1, 2)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_OWN_PROCESSES = ("converters.coreai.read.runtime_worker", "edkm_export.untrusted_worker")

Step = Callable[[], int]
"""Does something with the input in the working folder; returns an exit status."""


@dataclass
class Outcome:
    """What a case did.

    Attributes:
        statuses: of its steps.
        faults: what must not happen, in words.
        seconds: on the clock.
        peak_bytes: beyond what the parent holds.
        text: what was printed.
    """

    statuses: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    text: str = ""


def command(*arguments: object) -> Step:
    """A step that is a command of the command line."""

    def run() -> int:
        from edkm_export.cli.main import main

        sys.argv = ["edkm-export", *map(str, arguments)]
        shown = sys.stdout
        if arguments[0] == "generate":  # what a model writes is handed on as it is
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        try:
            main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 70
        finally:
            sys.stdout = shown

    return run


def run_case(steps: Sequence[Step], folder: Path, *, deadline_s: float = DEADLINE_S) -> Outcome:
    """Run steps, one after another, in a process whose working folder is `folder`.

    Args:
        steps: what to do.
        folder: holds the input; what is printed is put beside it.
        deadline_s: of processor time, for all steps together.
    """
    printed, told = folder.with_name(f"{folder.name}.printed"), folder.with_name(f"{folder.name}.told")
    own_bytes = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    # libraries may hold a few copies of an input while they parse it
    before = psutil.Process().memory_info()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        gc.freeze()  # a session of onnxruntime that another test left would wait for its threads, which are not here
        _child(steps, folder, printed, told, before.vms + _HARD_BYTES, int(deadline_s))
    status, usage = _wait(pid, started + 3 * deadline_s)
    outcome = Outcome(seconds=time.monotonic() - started)
    outcome.peak_bytes = max(0, usage.ru_maxrss * 1024 - before.rss)
    outcome.text = printed.read_bytes().decode("utf-8", "replace") if printed.is_file() else ""
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    outcome.statuses = [int(line[7:]) for line in lines if line.startswith("status ")]
    outcome.faults = [line for line in lines if not line.startswith("status ")]
    for path in (printed, told):
        path.unlink(missing_ok=True)
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        outcome.faults.append(f"hang: more than {deadline_s:g} s")
    elif os.WIFSIGNALED(status):
        outcome.faults.append(f"signal {os.WTERMSIG(status)}")
    elif len(outcome.statuses) != len(steps):
        outcome.faults.append(f"ended in step {len(outcome.statuses)} with {os.WEXITSTATUS(status)}")
    outcome.faults += [f"status {each}" for each in outcome.statuses if each not in _ALLOWED]
    if "Traceback (most recent call last)" in outcome.text:
        outcome.faults.append("traceback")
    if outcome.peak_bytes > own_bytes + _SLACK_BYTES:
        outcome.faults.append(f"memory: {outcome.peak_bytes / 1e6:.0f} MB for {own_bytes / 1e6:.1f} MB")
    if found := _CONTROL.search(outcome.text):
        outcome.faults.append(f"control character U+{ord(found[0]):04X} was printed")
    return outcome


def _wait(pid: int, until: float) -> tuple[int | None, resource.struct_rusage]:
    """Status, None when it had to be ended, and what it used."""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            _end_group(pid)
            return status, usage
        if time.monotonic() > until:
            _end_group(pid)
            _, _, usage = os.wait4(pid, 0)
            return None, usage
        time.sleep(0.002)


def _end_group(pid: int) -> None:
    """End what is left of the session that the child began, and nothing else."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _child(
    steps: Sequence[Step], folder: Path, printed: Path, told: Path, most_bytes: int, seconds: int
) -> None:
    """The life of the process; it does not return."""
    code = 99
    try:
        os.setsid()
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # files that a command writes have the size of its model; a fault must not fill the disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 31, 1 << 31))
        output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        report = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for the rest of this process
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

        def tell(line: str) -> None:
            os.write(report, f"{' '.join(line.split())}\n".encode("utf-8", "replace"))

        _watch(folder, tell)
        for step in steps:
            try:
                status = step()
            except BaseException:
                traceback.print_exc()
                status = 70
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            tell(f"status {status}")
        code = 0
    finally:
        os._exit(code)


def _watch(folder: Path, tell: Callable[[str], None]) -> None:
    """Report what no reader of a file may do: start a program, open a connection, write elsewhere."""
    allowed = tuple(
        os.path.realpath(each)
        for each in (folder, os.environ.get("TMPDIR", "/tmp"), "/dev", "/proc", Path.home() / ".cache")
    )

    def heard(event: str, given: tuple[object, ...]) -> None:
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
            words = str(given)
            if not any(name in words for name in _OWN_PROCESSES):
                tell(f"execution: {event} {words[:300]}")
        elif event == "open" and isinstance(given[0], str | bytes) and isinstance(given[1], str):
            path = os.path.realpath(os.fsdecode(given[0]))
            compiled = "__pycache__" in path  # of our own modules, by Python
            if set(given[1]) & set("wax+") and not compiled and not path.startswith(allowed):
                tell(f"wrote to {path}")
        elif event == "import" and isinstance(given[1], str) and given[1].startswith(str(folder)):
            tell(f"execution: import of {given[1]}")

    sys.addaudithook(heard)
