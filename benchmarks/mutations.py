"""Plant faults in exported packages and graphs, and count what the verifier finds.

    python -m benchmarks.mutations
    python -m benchmarks.mutations --model smollm2.pt

Without --model: every fault of the lists in tests/, in exports of the trained fixture, and exports of several families
and recipes in which nothing is wrong. With it: six faults in a package and a folder of a real Llama with float16 LUTs,
one `verify --localize` each; about a minute a fault for 135 million parameters. Prints one line a case, and the rates.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from converters.coreml.read import artifact as coreml
from converters.coreml.write import bundle as coreml_bundle
from converters.coreml.write.export_plan import plan_export
from converters.onnx.read import artifact as onnx
from converters.onnx.write import bundle as onnx_bundle
from converters.onnx.write.export_plan import plan_onnx
from edkm_export import checkpoint
from edkm_export.artifact.protocol import Artifact
from edkm_export.checkpoint import Checkpoint
from edkm_export.recipe import load_recipe
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.report import Report, Verdict

ROOT = Path(__file__).parents[1]

LOCATED = (
    "one LUT value is large",
    "swapped groups",
    "RoPE tables of another base",
    "missing norm weight",
    "off-by-one cache position",
    "float16 overflow",
)
"""What is planted in a real model."""

# Enough for a fault to show in the logits and behind the cache; the reports of real exports use 1,024.
SHORT = {"tokens": 48, "continuation": 4}


@dataclass(frozen=True)
class Case:
    """One planted fault and what came of it."""

    kind: str
    mutation: Any
    report: Report
    seconds: float

    @property
    def named(self) -> str:
        """The module that localization blames."""
        return self.report.faults[0].module if self.report.faults else ""

    def __str__(self) -> str:
        failed = ", ".join(rung.id for rung in self.report.rungs if rung.verdict is Verdict.FAIL)
        harm = "yes" if self.mutation.harmful else "no"
        operation = self.report.faults[0].op if self.report.faults else ""
        cells = (
            self.kind,
            self.mutation,
            harm,
            self.report.faithful_export.value,
            failed,
            self.named,
            operation,
        )
        return f"| {' | '.join(map(str, cells))} | {self.seconds:.0f} |"


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Checkpoint of a real Llama, float16 LUTs.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch.")
def main(model: Path | None, threads: int | None) -> None:
    """Count what the verifier finds."""
    logging.disable(logging.WARNING)
    if threads is not None:
        torch.set_num_threads(threads)
    text = (ROOT / "fixtures" / "heldout.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        good = in_fixture(Path(folder), text) if model is None else in_model(model, Path(folder), text)
    sys.exit(not good)


def in_fixture(work: Path, text: str) -> bool:
    """Every fault, and what is unharmed; True when nothing is missed and there is no false alarm."""
    from tests.faults.coreml_mutations import COREML_MUTATIONS, COREML_STATE_MUTATIONS
    from tests.faults.onnx_mutations import ONNX_MUTATIONS
    from tests.faults.unharmed import UNHARMED
    from tests.helpers.exports import palettized_folder

    made = palettized_folder(ROOT / "fixtures" / "tiny-llama", load_recipe("4bit"), work / "model.pt")
    options = {"tokens": 128, "continuation": 8}
    cases = plant(
        made,
        [
            ("Core ML, logits", package(made, "logits", work), coreml.open_artifact, COREML_MUTATIONS),
            (
                "Core ML, states",
                package(made, "swift-transformers", work),
                coreml.open_artifact,
                COREML_STATE_MUTATIONS,
            ),
            ("ONNX", graph(made, work), onnx.open_artifact, ONNX_MUTATIONS),
        ],
        text,
        work / "copy",
        options,
    )
    print("\n| unharmed export | verdict |\n|---|---|")
    verdicts = []
    for number, export in enumerate(UNHARMED):
        other, artifact = export.make(new(work / f"unharmed-{number}"))
        verdicts.append(
            verify_artifact(
                other, artifact, VerificationInputs(text, "held-out text", **options)
            ).faithful_export
        )
        print(f"| {export} | {verdicts[-1].value} |", flush=True)
    harmful = [case.report.faithful_export for case in cases if case.mutation.harmful]
    harmless = [case.report.faithful_export for case in cases if not case.mutation.harmful]
    caught, alarms = harmful.count(Verdict.FAIL), harmless.count(Verdict.FAIL)
    others = len(verdicts) - verdicts.count(Verdict.PASS)
    print(f"\ncaught {caught} of {len(harmful)} harmful changes ({caught / len(harmful):.0%})")
    print(f"false alarms: {alarms} of {len(harmless)} harmless changes, {others} of {len(verdicts)} exports")
    right = print_located(cases)
    return caught == len(harmful) and alarms == others == 0 and right


def in_model(path: Path, work: Path, text: str) -> bool:
    """The six faults in a real model; True when each module is named."""
    from tests.faults.coreml_mutations import COREML_MUTATIONS, COREML_STATE_MUTATIONS
    from tests.faults.onnx_mutations import ONNX_MUTATIONS

    made = checkpoint.load(path)
    if any(tensor.lut.dtype != torch.float16 for tensor in made.palettized.values()):
        raise click.UsageError(f"{path}: has int8 LUTs; the faults are planted in float16 ones.")
    in_packages = [*COREML_MUTATIONS, *COREML_STATE_MUTATIONS]
    suites = [
        ("Core ML", package(made, "swift-transformers", work), coreml.open_artifact, located(in_packages)),
        ("ONNX", graph(made, work), onnx.open_artifact, located(ONNX_MUTATIONS)),
    ]
    return print_located(plant(made, suites, text, work / "copy", SHORT))


def located(mutations: Sequence[Any]) -> list[Any]:
    """Those of a list that are planted in a real model; a float32 graph has no float16 to overflow."""
    return [mutation for mutation in mutations if mutation.name in LOCATED]


Suite = tuple[str, Path, Callable[[Path], Artifact], Sequence[Any]]


def plant(
    made: Checkpoint, suites: Sequence[Suite], text: str, copy: Path, options: dict[str, int]
) -> list[Case]:
    """Verify a copy with each fault, with localization."""
    print("| artifact | change | harmful | verdict | failed | first fault | operation | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    cases = []
    for kind, exported, open_artifact, mutations in suites:
        for mutation in mutations:
            start, target = time.monotonic(), copy / exported.name
            shutil.copytree(exported, target)
            try:
                mutation.apply(target, made)
                evaluation = VerificationInputs(text, "held-out text", localize=True, **options)
                report = verify_artifact(made, open_artifact(target), evaluation)
            finally:
                shutil.rmtree(copy)
            cases.append(Case(kind, mutation, report, time.monotonic() - start))
            print(cases[-1], flush=True)
    return cases


def print_located(cases: Sequence[Case]) -> bool:
    """How many modules were named rightly, of those that have a place; True when all were."""
    placed = [case for case in cases if case.mutation.module]
    right = sum(case.named == case.mutation.module for case in placed)
    print(f"localized: {right} of {len(placed)} that have a place")
    return right == len(placed)


def package(made: Checkpoint, interface: str, work: Path) -> Path:
    """An .mlpackage; the fixture's 64 positions are enough for all of its windows."""
    length = 64 if made.numel < 10_000_000 else None
    plan = plan_export(made, interface=interface, sequence_length=length)
    return coreml_bundle.write_bundle(made, plan, new(work / interface), "model")


def graph(made: Checkpoint, work: Path) -> Path:
    """An ONNX folder."""
    folder = new(work / "onnx")
    onnx_bundle.write_bundle(made, plan_onnx(made), folder)
    return folder


def new(folder: Path) -> Path:
    """An empty folder."""
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
