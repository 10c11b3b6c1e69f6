"""How long a command takes to say that it cannot do what is asked.

    python -m benchmarks.refusals

Each command line is run in a process of its own, in a folder that holds a text, an empty text, and a folder with a LoRA
adapter; it must end with status 2 and one line. The time is that of the whole process, Python's start included: the
fastest of --runs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

LINES = (
    "palettize nope -o model.pt",
    "palettize there.pt -o model.pt",
    "palettize adapter -o model.pt",
    "palettize model --calibration empty.txt -o model.pt",
    "train model --data nope.txt -o run",
    "train nope --data there.txt -o run",
    "coreml nope.pt",
    "coreml there.pt --text nope.txt",
    "onnx there.pt --original nope",
    "verify nope",
    "verify nope.pt model",
    "compare nope.pt",
    "generate nope.pt --prompt x",
    "push nope OWNER/NAME",
    "inspect nope",
    "import nope.pt --model model -o model.pt",
)


def prepare(folder: Path) -> None:
    for name in ("there.pt", "there.txt"):
        (folder / name).write_text("Some words, so that it is a text and long enough to be one.")
    (folder / "empty.txt").touch()
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")


def refuse(line: str, folder: Path) -> tuple[float, str]:
    """Seconds of the process, and what it said."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "edkm_export", *line.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - start
    said = done.stderr.strip().replace(f"{sys.executable} -m edkm_export", "edkm-export")
    if done.returncode != 2 or "\n" in said:
        raise SystemExit(f"{line}: status {done.returncode}, {said}")
    return taken, said


@click.command(help=__doc__)
@click.option("--runs", default=3, show_default=True)
def main(runs: int) -> None:
    print("| command | s | what it says |\n|---|---:|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for line in LINES:
            taken, said = min(refuse(line, folder) for _ in range(runs))
            print(f"| `{line}` | {taken:.2f} | {said.partition(': ')[2]} |", flush=True)


if __name__ == "__main__":
    main()
