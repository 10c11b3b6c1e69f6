"""Run a command and measure its wall time and peak resident memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Wall time in seconds, and the most resident memory in bytes, file pages that it mapped included."""

    seconds: float
    peak_bytes: int
    status: int


def measure(command: Sequence[str]) -> Measured:
    start = time.monotonic()
    process = subprocess.Popen(list(command))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts ru_maxrss in units of 1024 bytes.
    return Measured(time.monotonic() - start, usage.ru_maxrss * 1024, process.returncode)
