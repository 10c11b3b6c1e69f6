"""docs/report.md says what is checked: its tables name every rung, with the numbers of thresholds.py."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from edkm_export.artifact import thresholds as t
from edkm_export.artifact.metrics import Divergence, Perplexity
from edkm_export.artifact.protocol import DamagedArtifact
from edkm_export.checkpoint import Checkpoint
from edkm_export.recipe import PRESETS
from edkm_export.training.train_config import PRESETS as TRAINED
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.context_claim import context_rung
from edkm_export.verify.foreign_decoding import compare_decoding
from edkm_export.verify.report import Rung
from edkm_export.verify.rungs import (
    continuation_rung,
    decode_rung,
    execution_rung,
    kv_cache_rung,
    palettization_rung,
    size_rung,
    soft_rungs,
)
from edkm_export.verify.source_rung import source_rung, source_runtime_rung
from edkm_export.verify.task_rungs import answers_rung, tasks_rung
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
DAMAGED = DamagedArtifact(ROOT, "none", "damaged")


def rows() -> dict[str, str]:
    """{id of a rung: its threshold}, of both tables."""
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (
            line.startswith("| `")
            and len(cells) in (3, 4)
            and cells[0] != "`id`"
            and re.fullmatch("`[a-z0-9.-]+`", cells[0])
        ):
            found[cells[0].strip("`")] = cells[-1]
    return found


ROWS = rows()


def numbers(text: str) -> list[float]:
    """Every number of a text, percentages as shares; those in names (`top-1`, `float32`) are not numbers."""
    text = re.sub(r"`[^`]*`|top-1|(?:float|int)\d+", "", text)
    found = re.findall(r"(\d+(?:\.\d+)?(?:e-?\d+)?)(%?)", text)
    return [float(digits) / (100 if percent else 1) for digits, percent in found]


def measured() -> tuple[Divergence, dict[str, Perplexity]]:
    distance = Divergence(
        tokens=1, kl_mean=0, kl_median=0, kl_p999=0, kl_max=0, top1_agreement=1, near_ties=0
    )
    one = Perplexity(value=1, standard_error=0, tokens=1)
    return distance, dict.fromkeys(
        ("original", "trained soft model", "hard PyTorch", "hard PyTorch, int8 keys and values"), one
    )


def foreign_decoding() -> Rung:
    artifact: Any = SimpleNamespace(
        decoder_name="x", decoder_missing="it is not here", decoded_elsewhere=lambda: iter(())
    )
    made = compare_decoding(Checkpoint(config={}, palettized={}, dense={}), artifact)
    assert made is not None
    return made


def rungs() -> dict[str, Rung]:
    """Every rung but the executions, as the ladder makes them."""
    distance, perplexities = measured()
    made = [
        source_rung(Checkpoint(config={}, palettized={}, dense={}), None, ""),
        source_runtime_rung(None, rounded=False),
        *soft_rungs("", "", distance, distance, perplexities),
        palettization_rung(t.quality_limit(4), "", distance, perplexities),
        kv_cache_rung(distance, perplexities, "hard PyTorch, int8 keys and values", limited=True),
        tasks_rung(None, "no original", None),
        answers_rung(None, "no items", "x"),
        compare_bytes(Checkpoint(config={}, palettized={}, dense={}), DAMAGED)[0],
        size_rung(1, 1),
        context_rung(1, 1),
        foreign_decoding(),
        decode_rung(None, "no cache"),
        continuation_rung(None, "no cache"),
        continuation_rung(None, "no cache", rounded=True),
    ]
    return {rung.id: rung for rung in made}


def execution_ids() -> set[str]:
    """Ids that the converters give to executions."""
    known = {f"execution-{name}" for name in t.EXECUTION}
    for path in (ROOT / "converters").rglob("read/artifact.py"):
        known |= set(re.findall(r'"(execution-[a-z-]+)"', path.read_text(encoding="utf-8")))
    return known


def test_every_rung_has_a_row():
    executions = {name for name in ROWS if name.startswith("execution-") and name != "execution-..."}
    assert executions == execution_ids() and len(executions) >= 6
    assert ROWS.keys() - executions - {"execution-..."} == rungs().keys()


EXPECTED: dict[str, list[float]] = {
    "source": [],
    "source-llama.cpp": [
        *(t.SOURCE_RUNTIME[False].top1, t.SOURCE_RUNTIME[False].median_kl),
        *(t.SOURCE_RUNTIME[True].top1, t.SOURCE_RUNTIME[True].median_kl),
    ],
    "soft": [],
    "hardening": [],
    "palettization": [],
    "kv-cache": [t.KV_CACHE_RATIO],
    "bytes": [],
    "size": [t.SIZE_TOLERANCE],
    "context": [],
    "prefill-decode": [t.DECODE_KL, t.DECODE_MEDIANS],
    "continuation": [t.NEAR_TIE_NATS],
    "continuation-rounded": [t.ROUNDED_TIE_NATS],
    "decoding": [],
    "tasks": [],
    "tasks-artifact": [],
    "execution-...": [],
    "execution-coreai-twin": [t.FLOAT16_TWIN.top1, t.FLOAT16_TWIN.median_kl],
    "execution-coreai": [t.float16_chains([1]).top1],
    "execution-float32": [t.EXECUTION["float32"].top1, t.EXECUTION["float32"].median_kl],
    "execution-rounded": [t.EXECUTION["rounded"].top1, t.EXECUTION["rounded"].median_kl],
    "execution-apple": [],
    "execution-onnxruntime": [t.INT8_ACTIVATIONS.top1, t.INT8_ACTIVATIONS.median_kl],
    "execution-onnxruntime-plain": [],
    "execution-onnxruntime-padded": [],
    "execution-reference": [],
}


@pytest.mark.parametrize("name", ROWS)
def test_numbers_are_those_of_the_thresholds(name):
    assert numbers(ROWS[name]) == pytest.approx(EXPECTED[name], rel=1e-9)


def test_reports_give_the_same_numbers():
    assert numbers(rungs()["size"].threshold) == pytest.approx(EXPECTED["size"])


# The limit of the quality


def limits() -> dict[str, tuple[set[str], str]]:
    """{fewest bits, as the table says it: (presets, limit)}."""
    table = PAGE.partition("### The limit\n")[2].partition("\n\nA checkpoint holds")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "fewest bits of a palettized weight":
            found[cells[0]] = (set(re.findall("`([^`]+)`", cells[1])), cells[2])
    return found


def bits_of(preset: str) -> int | None:
    """Fewest bits that a preset gives to a weight; None: it palettizes nothing."""
    if preset in PRESETS:
        return min((rule.bits for rule in PRESETS[preset].rules if not rule.skip), default=None)
    return TRAINED[preset].bits


def test_every_preset_has_a_limit():
    presets = [name for names, _ in limits().values() for name in names]
    assert sorted(presets) == sorted(PRESETS.keys() | TRAINED.keys())
    for name in PRESETS.keys() & TRAINED.keys():
        assert bits_of(name) == TRAINED[name].bits


def test_limits_are_those_of_the_thresholds():
    rows = limits()
    assert rows.keys() == {"nothing palettized", *map(str, t.PERPLEXITY_RATIO)}
    for bits, (presets, limit) in rows.items():
        number = int(bits) if bits.isdigit() else None
        assert all(bits_of(name) == number for name in presets)
        ratio = t.quality_limit(number).ratio
        assert limit == "none: REPORTED" if ratio is None else numbers(limit) == [ratio]


def test_limits_grow_as_bits_become_fewer():
    ratios = [
        t.DENSE_PERPLEXITY_RATIO,
        *(ratio for _, ratio in sorted(t.PERPLEXITY_RATIO.items(), reverse=True)),
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    assert known == sorted(known) and len(known) == len(ratios) - 1


def test_tolerances_of_localization():
    found = re.search(r"without a match within (\S+) \((\S+) in float16\)", " ".join(PAGE.split()))
    assert found is not None
    expected = [t.LOCAL_TOLERANCE["float32"], t.LOCAL_TOLERANCE["rounded"]]
    assert numbers(" ".join(found.groups())) == pytest.approx(expected)


def test_near_ties_of_the_text():
    found: Any = re.search(r"the same probability within (\S+)\.", " ".join(PAGE.split()))
    assert numbers(found[1]) == pytest.approx([t.NEAR_TIE_NATS])


def test_an_execution_that_is_not_run_shows_its_threshold():
    rung = execution_rung(DAMAGED.executions[0], "")
    assert numbers(rung.threshold) == pytest.approx(EXPECTED["execution-float32"])


def test_tolerances_of_what_is_held():
    """Of int8 keys and values, by arithmetic."""
    found = re.search(
        r"within (\S+) in float32 \((\S+) in float16, (\S+) where activations", " ".join(PAGE.split())
    )
    assert found is not None
    kinds = (t.EXECUTION["float32"], t.EXECUTION["rounded"], t.INT8_ACTIVATIONS)
    assert numbers(" ".join(found.groups())) == pytest.approx([t.held_tolerance(kind) for kind in kinds])
