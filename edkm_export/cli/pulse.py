"""Signs of life from a process of its own, while native code keeps every Python thread of ours from running.

The process runs this file without the package, so that it is there within a tenth of a second.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

__all__ = ["Pulse", "duration"]

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_CLEAR = "\r\x1b[2K"


def duration(seconds: float) -> str:
    """Whole seconds, and minutes and hours where there are any."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Pulse:
    """A process that says every so often that something is still done, until it is stopped or we are gone.

    Args:
        descriptor: of the file that it writes to.
        words: what is done.
        seconds: how long it has been done by now.
        every_s: time between two signs.
        moving: the file is a terminal: draw over one line. Otherwise each sign is a line.
    """

    def __init__(self, descriptor: int, words: str, seconds: float, every_s: float, *, moving: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, words, str(seconds), str(every_s), "moving" * moving],
            stdin=subprocess.PIPE,  # its end tells the process to end
            stdout=descriptor,
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        """End it; a line that it drew is gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(words: str, seconds: str, every_s: str, moving: str) -> None:
    """Write signs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this answers it
    began, frame = time.monotonic() - float(seconds), 0

    def write(text: str) -> None:
        os.write(1, text.encode(errors="replace"))

    while not select.select([0], [], [], float(every_s))[0]:
        shown = duration(time.monotonic() - began)
        if moving:
            write(f"{_CLEAR}{_FRAMES[frame % len(_FRAMES)]} {words}  {shown}")
            frame += 1
        else:
            write(f"- {words}, {shown} so far\n")
    if moving:
        write(_CLEAR)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError:  # nobody reads any more
        sys.exit(0)
