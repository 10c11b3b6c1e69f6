"""A file system on which the process is killed at a chosen call: at each flush and each change of a name in turn.

Commands are run in forked processes, so that a kill is a real one: nothing is cleaned up, locks end with the process.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edkm_export import claims, filesystem

__all__ = ["FileSystem", "Outcome", "run_command"]

_CALLS = ("fsync", "rename", "replace", "link", "rmdir", "unlink", "remove")
_FD = Path("/proc/self/fd")


@dataclass
class FileSystem:
    """Stands before the calls of `os`, and the exchange of names, that concern a folder.

    Attributes:
        folder: whose calls are counted, with all that is in it.
        kill_at: the call at which the process is killed, before it is made, counted from 1; None: none.
        calls: what was called until now, with the path below the folder.
    """

    folder: Path
    kill_at: int | None = None
    calls: list[str] = field(default_factory=list)

    def install(self) -> None:
        """Take the place of the calls, in this process, for good."""
        for name in _CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        claims.exchange = self._wrapped("exchange", filesystem.exchange)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            concerned = self._below(arguments[0], options.get("dir_fd"))
            if concerned is not None:
                self.calls.append(f"{name} {concerned}")
                if len(self.calls) == self.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    def _below(self, path: Any, parent: int | None) -> str | None:
        """A path or descriptor, relative to the folder; None: it is not in there."""
        whole = (_FD / str(path)).readlink() if isinstance(path, int) else Path(os.fsdecode(path))
        if parent is not None:
            whole = (_FD / str(parent)).readlink() / whole
        whole = Path(os.path.abspath(whole))  # noqa: PTH100  # a link itself is meant
        return str(whole.relative_to(self.folder)) if whole.is_relative_to(self.folder) else None


@dataclass(frozen=True)
class Outcome:
    """How a forked command ended.

    Attributes:
        status: its exit status; None: it was killed.
        calls: what the file system saw; of one that was killed, nothing.
        err: what it printed to standard error.
    """

    status: int | None
    calls: tuple[str, ...]
    err: str


def run_command(arguments: list[str], folder: Path, scratch: Path, *, kill_at: int | None = None) -> Outcome:
    """Run `edkm-export ARGUMENTS` in a folder, in a process of its own that holds what this one has imported.

    Args:
        arguments: of the command.
        folder: to work in, whose file system is watched.
        scratch: an existing folder elsewhere.
        kill_at: see `FileSystem`.
    """
    said, called = scratch / "said", scratch / "called"
    called.write_text("")
    child = os.fork()
    if not child:
        gc.freeze()  # a session of onnxruntime that another test left would wait for its threads, which are not here
        status = 99
        try:
            with said.open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(folder)
            sys.argv = ["edkm-export", *arguments]
            watched = FileSystem(folder, kill_at)
            watched.install()
            status = _status_of_main()
            sys.stderr.flush()
            called.write_text("\n".join(watched.calls))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(ended)
    assert not killed or os.WTERMSIG(ended) == signal.SIGKILL, (
        f"signal {os.WTERMSIG(ended)}: {said.read_text()}"
    )
    return Outcome(
        None if killed else os.WEXITSTATUS(ended), tuple(_lines(called)), said.read_text(errors="replace")
    )


def _status_of_main() -> int:
    from edkm_export.cli.main import main

    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)


def _lines(path: Path) -> Iterator[str]:
    yield from path.read_text().splitlines()
