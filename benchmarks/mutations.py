"""Plant faults in exported packages and graphs of the trained fixture, and count what the verifier finds.

    python benchmarks/mutations.py

Prints one line a fault and the catch rate. The same lists run in tests/verify/test_mutations.py.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters.coreml import artifact as coreml
from converters.coreml import bundle as coreml_bundle
from converters.coreml.export_plan import plan_export
from converters.onnx import artifact as onnx
from converters.onnx import bundle as onnx_bundle
from converters.onnx.plan import plan_onnx
from edkm_export import checkpoint
from edkm_export.checkpoint import Checkpoint
from edkm_export.models.source import Source, load_model, load_tokenizer, tokenizer_files
from edkm_export.palettize import palettize_model
from edkm_export.recipe import load_recipe
from edkm_export.verify.artifact import Artifact
from edkm_export.verify.evaluation import Evaluation
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.report import Verdict

ROOT = Path(__file__).parents[1]


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from coreml_mutations import COREML_MUTATIONS, COREML_STATE_MUTATIONS
    from onnx_mutations import ONNX_MUTATIONS

    logging.disable(logging.WARNING)
    text = (ROOT / "fixtures" / "heldout.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = _palettize(work / "model.pt")
        logits = coreml_bundle.write_bundle(
            model, plan_export(model, interface="logits", sequence_length=64), _made(work / "logits"), "model"
        )
        stateful = coreml_bundle.write_bundle(
            model,
            plan_export(model, interface="swift-transformers", sequence_length=64),
            _made(work / "stateful"),
            "model",
        )
        graph = _made(work / "onnx")
        onnx_bundle.write_bundle(model, plan_onnx(model), graph)
        rows = [
            (kind, mutation, *_climb(mutation, model, artifact, open_artifact, text, work / "copy"))
            for kind, mutations, artifact, open_artifact in (
                ("Core ML, logits", COREML_MUTATIONS, logits, coreml.open_artifact),
                ("Core ML, states", COREML_STATE_MUTATIONS, stateful, coreml.open_artifact),
                ("ONNX", ONNX_MUTATIONS, graph, onnx.open_artifact),
            )
            for mutation in mutations
        ]
    print("| artifact | change | harmful | verdict | failed | first fault |")
    print("|---|---|---|---|---|---|")
    for kind, mutation, verdict, failed, module in rows:
        harm = "yes" if mutation.harmful else "no"
        print(f"| {kind} | {mutation} | {harm} | {verdict.value} | {', '.join(failed)} | {module} |")
    harmful = [verdict for _, mutation, verdict, *_ in rows if mutation.harmful]
    harmless = [verdict for _, mutation, verdict, *_ in rows if not mutation.harmful]
    caught, alarms = harmful.count(Verdict.FAIL), harmless.count(Verdict.FAIL)
    print(f"\ncaught {caught} of {len(harmful)} harmful changes ({caught / len(harmful):.0%})")
    print(f"false alarms: {alarms} of {len(harmless)} harmless changes")
    claimed = [(mutation.module, module) for _, mutation, _, _, module in rows if mutation.module]
    print(f"localized: {sum(a == b for a, b in claimed)} of {len(claimed)} that have a place")
    sys.exit(caught < len(harmful) or alarms > 0)


def _palettize(path: Path) -> Checkpoint:
    source = Source.parse(str(ROOT / "fixtures" / "tiny-llama"))
    model, tokenizer, recipe = load_model(source), load_tokenizer(source), load_recipe("4bit")
    files, config = tokenizer_files(tokenizer, model), model.config.to_dict()
    parts = palettize_model(model, recipe, source="tiny-llama")
    checkpoint.save(
        Checkpoint(
            config=config,
            palettized=parts.palettized,
            dense=parts.dense,
            tied=parts.tied,
            tokenizer=files,
            recipe=recipe.model_dump(mode="json"),
            provenance={},
        ),
        path,
    )
    return checkpoint.load(path)


def _climb(
    mutation: Any,
    model: Checkpoint,
    artifact: Path,
    open_artifact: Callable[[Path], Artifact],
    text: str,
    copy: Path,
) -> tuple[Verdict, list[str], str]:
    """Verdict, failed rungs, and what localization names."""
    target = copy / artifact.name
    shutil.copytree(artifact, target)
    try:
        mutation.apply(target, model)
        evaluation = Evaluation(text, "held-out text", tokens=128, continuation=8, localize=True)
        report = verify_artifact(model, open_artifact(target), evaluation)
    finally:
        shutil.rmtree(copy)
    failed = [rung.id for rung in report.rungs if rung.verdict is Verdict.FAIL]
    return report.verdict, failed, report.faults[0].module if report.faults else ""


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
