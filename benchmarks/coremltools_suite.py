"""coremltools' own tests in our interpreter: run them, whole or a seeded sample, and make the table of results.

    python -m benchmarks.coremltools_suite --sample 12
    python -m benchmarks.coremltools_suite --from results.jsonl --write docs/results.md

Needs the extra `coremltools-tests`. Exit status 1 when a prediction is wrong, or a valid program fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Modules of tests that make ML programs. Those of neural networks, of TensorFlow (which is not installed), of
# scikit-learn and XGBoost, and of training with coremltools.optimize.torch never predict with one.
OPS = ("converters/mil/mil/ops/tests",)
SHARED = ("converters/mil/frontend/torch/test/test_torch_ops.py",)  # large, and run by several processes
REST = (
    "converters/mil/frontend/torch/test",
    "converters/mil/frontend/milproto",
    "converters/mil/mil/tests",
    "converters/mil/mil/passes/tests",
    "converters/mil/backend/mil",
    "converters/mil/test_inputs_outputs_shape.py",
    "test/api",
    "test/ml_program",
    "test/optimize/coreml",
)

WORDS = {
    "predicted": "passed, with a prediction",
    "passed": "passed, never predicts",
    "skipped": "skipped by the suite",
    "expected failure": "expected by the suite to fail",
    "refused": "refused: an op, or a form of one, that is not implemented",
    "undefined": "refused: an index out of range, whose effect Core ML does not define",
    "not reached": "failed before a prediction: conversion with these versions, or a neural network",
    "not collected": "modules that cannot be imported with the installed packages",
    "known": "the expectation of the test does not hold, see below",
    "wrong": "**wrong**",
    "package error": "**a valid program refused as damaged**",
    "untyped error": "**untyped error**",
}
FAULTS = ("wrong", "package error", "untyped error")
_BEGIN, _END = "<!-- coremltools suite: begin -->", "<!-- coremltools suite: end -->"


def run(args: argparse.Namespace, results: Path) -> None:
    """Run the tests; each leaves a line in `results`."""
    folder = Path(importlib.metadata.distribution("coremltools").locate_file("coremltools"))
    paths = args.paths or (OPS + SHARED if args.all else OPS)
    for path in paths:
        if not (folder / path.partition("::")[0]).exists():
            sys.exit(
                f"{path}: no such file or folder of coremltools {importlib.metadata.version('coremltools')}"
            )
    _pytest(args, folder, paths, results, args.workers)
    if args.all and not args.paths:
        _run_modules(args, folder, results)


def _run_modules(args: argparse.Namespace, folder: Path, results: Path) -> None:
    """Run the other modules in processes of their own: several would not agree on the order of the tests in them."""
    found = {
        file
        for path in REST
        for file in [folder / path, *(folder / path).rglob("test_*.py")]
        if file.is_file()
    }
    modules = sorted(str(file.relative_to(folder)) for file in found - {folder / path for path in SHARED})
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.workers) as pool:
        files = [Path(temporary) / f"{number}.jsonl" for number in range(len(modules))]
        runs = [
            pool.submit(_pytest, args, folder, [module], file, 0)
            for module, file in zip(modules, files, strict=True)
        ]
        for one in runs:
            one.result()
        with results.open("a", encoding="utf-8") as whole:
            for file in files:
                whole.write(file.read_text(encoding="utf-8"))


def _pytest(
    args: argparse.Namespace, folder: Path, paths: Sequence[str], results: Path, workers: int
) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.coremltools_suite.plugin",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-c", str(ROOT / "tests/coremltools_suite/settings.ini"), "--rootdir", str(folder)]
    command += ["-q", "--no-header", "--tb=no", "-r", "", "--continue-on-collection-errors"]
    command += ["-n", str(workers), "--dist", "load"]
    command += ["--suite-results", str(results.resolve()), "--suite-precision", args.precision]
    command += ["--suite-sample", str(args.sample), "--suite-seed", str(args.seed)]
    command += [str(folder / path) for path in paths]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "TQDM_DISABLE": "1",
    }
    if args.float32_programs:
        environment["INCLUDE_MIL_FP32_UNIT_TESTS"] = "1"
    with tempfile.TemporaryDirectory() as elsewhere:  # some tests leave files where they run
        done = subprocess.run(command, env=environment, cwd=elsewhere, check=False)
    if done.returncode not in (
        0,
        1,
        5,
    ):  # 1: tests failed, which the table tells apart; 5: a module is skipped whole
        sys.exit(done.returncode)


def read(results: Path) -> list[dict[str, Any]]:
    """One entry a test."""
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return list({entry["test"]: entry for entry in found}.values())


def table(found: list[dict[str, Any]], words: str) -> str:
    """Markdown: how many tests ended how, and what was refused."""
    kinds = Counter(entry["kind"] for entry in found)
    lines = [words, "", "| outcome | tests |", "|---|---|"]
    lines += [f"| {WORDS[kind]} | {kinds[kind]:,} |" for kind in WORDS if kinds[kind] or kind in FAULTS]
    lines.append(f"| in all | {len(found):,} |")
    refused = Counter(entry["detail"] for entry in found if entry["kind"] == "refused")
    if refused:
        lines += ["", "| refused | tests |", "|---|---|"]
        lines += [f"| {reason.replace('|', '/')} | {count:,} |" for reason, count in refused.most_common()]
    known = Counter(entry["detail"] for entry in found if entry["kind"] == "known")
    if known:
        lines += ["", "| expectation that does not hold | tests |", "|---|---|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in known.most_common()]
    return "\n".join(lines)


def write(document: Path, section: str) -> None:
    """Put the table into a document, between its marks or at the end."""
    text = document.read_text(encoding="utf-8")
    block = f"{_BEGIN}\n{section}\n{_END}"
    pattern = re.escape(_BEGIN) + ".*?" + re.escape(_END)
    if re.search(pattern, text, re.DOTALL):
        text = re.sub(pattern, lambda _: block, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n## coremltools' own tests\n\n{block}\n"
    document.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", help="files or folders below coremltools; default: the op tests")
    parser.add_argument("--all", action="store_true", help="also the tests of converters and packages")
    parser.add_argument("--sample", type=int, default=1, help="run one test in so many")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample")
    parser.add_argument("--precision", default="float32", help="float32, rounded or float16")
    parser.add_argument("--float32-programs", action="store_true", help="also convert to float32")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--results", type=Path, help="keep one JSON line a test here")
    parser.add_argument("--from", dest="given", type=Path, nargs="+", help="make the table of these results")
    parser.add_argument("--write", type=Path, help="document that the table is written into")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = args.results or Path(folder) / "results.jsonl"
        if not args.given:
            run(args, results)
        found = [entry for file in args.given or [results] for entry in read(file)]
    size = (
        "all tests of the modules that were run"
        if args.sample == 1
        else f"one test in {args.sample}, seed {args.seed}"
    )
    version = importlib.metadata.version("coremltools")
    section = table(found, f"coremltools {version}, {size}, in {args.precision}.")
    print(f"\n{section}\n")
    if args.write:
        write(args.write, section)
    bad = [entry for entry in found if entry["kind"] in FAULTS]
    for entry in bad:
        print(f"{entry['kind']}: {entry['test']}\n    {entry['detail'][:400]}")
    passed = sum(entry["kind"] in ("predicted", "passed") for entry in found)
    print(f"{passed} passed, {len(bad)} failed, {len(found) - passed - len(bad)} skipped")
    sys.exit(1 if bad or not passed else 0)


if __name__ == "__main__":
    main()
