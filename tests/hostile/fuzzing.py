"""Hostile inputs by number: the same number is the same input.

    python -m tests.hostile.fuzzing --minutes 30 --seed 7

runs as many as fit, prints what it finds and how to repeat it, and ends with status 1 if there was anything.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.hostile.archives import CANARY
from tests.hostile.harness import Outcome, run_case
from tests.hostile.readers import READERS, Seeds, make_seeds

__all__ = ["fuzz_case", "prepare"]


def prepare(folder: Path) -> Seeds:
    """Sound inputs; what a process does once, such as importing torch, is done here and not in each case."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    return make_seeds(folder)


def fuzz_case(
    reader: str, number: int, seeds: Seeds, work: Path, *, whole: bool = True
) -> tuple[str, Outcome]:
    """Make an input, read it, and clean up; says what was done, and what came of it.

    Args:
        reader: its name.
        number: of the input.
        seeds: sound inputs.
        work: a folder to work in.
        whole: do all that is to be done with the input; otherwise the first step alone.
    """
    draw = random.Random(f"{reader} {number}")
    folder = work / f"{reader}-{number}"
    shutil.copytree(seeds.folder / reader, folder, symlinks=True)
    try:
        words = READERS[reader].damage(draw, folder, seeds)
        steps = READERS[reader].steps(draw, folder, seeds)
        outcome = run_case(steps if whole else steps[:1], folder)
        if (folder / CANARY).exists():
            outcome.faults.append("execution: a pickle was run")
    finally:
        for path in (folder, *folder.rglob("*")):  # some were made unreadable
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
    return words, outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--cases", type=int, help="end after so many")
    parser.add_argument(
        "--seed", type=int, default=0, help="first number of the inputs; 100,000 numbers a seed"
    )
    parser.add_argument("--reader", action="append", choices=list(READERS), help="these alone")
    parser.add_argument("--number", type=int, help="this one input of --reader alone, with what it prints")
    parser.add_argument(
        "--whole", type=int, default=1, help="one in so many is also converted, continued or verified"
    )
    parser.add_argument("--seeds", type=Path, help="folder of sound inputs, to be made once and used again")
    options = parser.parse_args()
    readers = []
    for name in options.reader or READERS:
        if reason := READERS[name].available():
            print(f"NOT RUN: {name}: {reason}")
        else:
            readers.append(name)
    with tempfile.TemporaryDirectory(prefix="edkm-fuzz-") as name:
        seeds = prepare((options.seeds or Path(name) / "seeds").absolute())  # cases change the folder
        if options.number is not None:
            words, outcome = fuzz_case(readers[0], options.number, seeds, Path(name))
            print(f"{words}\n{outcome.text}\n{outcome.statuses} {outcome.faults} {outcome.seconds:.1f} s")
            return bool(outcome.faults)
        return _many(readers, options.seed * 100_000, options, seeds, Path(name))


def _many(readers: list[str], first: int, options: argparse.Namespace, seeds: Seeds, work: Path) -> int:
    until, done, faulty = time.monotonic() + 60 * options.minutes, 0, 0
    ends: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    while time.monotonic() < until and (options.cases is None or done < options.cases):
        reader, number = readers[done % len(readers)], first + done // len(readers)
        words, outcome = fuzz_case(reader, number, seeds, work, whole=number % options.whole == 0)
        done += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.peak_bytes)
        ends[f"{reader} {outcome.statuses[-1] if outcome.statuses else '-'}"] += 1
        if outcome.faults:
            faulty += 1
            last = (outcome.text.strip().splitlines() or [""])[-1]
            print(
                f"--reader {reader} --number {number}: {words!a}\n  {outcome.faults!a}\n  {last[:300]!a}",
                flush=True,
            )
    print(f"{done} inputs, numbers {first} to {first + done // len(readers)} of {', '.join(readers)}")
    print(f"last statuses: {dict(sorted(ends.items()))}")
    print(f"slowest {slowest:.1f} s, most memory {largest / 1e6:.0f} MB beyond the process")
    print(f"{faulty} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
