"""Apple's packages are silenced, and our progress is not."""

import subprocess
import sys

_SCRIPT = """
import os, sys
from converters.coreai.backend import quiet
from edkm_export.cli.terminal import Terminal
console = Terminal(stderr=True)
with quiet():
    print("a library", file=sys.stderr)
    print("a library")
    os.write(2, b"native code")
    console.print("progress")
print("after", file=sys.stderr)
"""


def test_progress_is_shown_while_libraries_are_silenced() -> None:
    run = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "progress\nafter\n")
