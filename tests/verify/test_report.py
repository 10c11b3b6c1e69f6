from __future__ import annotations

import html
import json
import math
import re
from typing import Any

import jsonschema
import pytest

from edkm_export.artifact.metrics import Divergence, Perplexity
from edkm_export.verify.report import (
    SCHEMA_VERSION,
    LayerError,
    PromptTexts,
    Report,
    Rung,
    Size,
    TensorReport,
    TimeBudget,
    Verdict,
)
from edkm_export.verify.verdicts import (
    faithful_export,
    faithful_words,
    one_line,
    quality,
    quality_words,
    tally,
)
from edkm_export.verify.words import GLOSSARY
from edkm_export.verify.write import markdown, write_report
from tests.helpers.paths import ROOT


def rung(verdict: Verdict = Verdict.PASS, **changes: Any) -> Rung:
    fields = {
        "id": "bytes",
        "reference": "hard PyTorch",
        "candidate": "decoded artifact",
        "threshold": "equal",
        "why": "conversion computes nothing",
        "detail": "2 of 2 bit-exact",
    }
    return Rung(**{**fields, "verdict": verdict, **changes})


def tensor(index: int, **changes: Any) -> TensorReport:
    fields = {
        "name": f"layers.{index}.weight",
        "shape": [32, 16],
        "n_bits": 4,
        "groups": (2, 1),
        "dim": 1,
        "lut_dtype": "float16",
        "used_centroids": 30,
        "centroids": 32,
        "bits_per_weight": 5.0,
        "bit_exact": True,
        "index_entropy": 3.5,
        "weight_snr_db": 20.0 + index,
    }
    return TensorReport(**{**fields, **changes})


def report(**changes: Any) -> Report:
    fields = {
        "artifact": "model.mlpackage",
        "kind": "coreml",
        "faithful_export": Verdict.PASS,
        "quality": Verdict.WITHIN,
        "not_run": ["Apple runtime: needs macOS, this is Linux"],
        "rungs": [rung()],
        "perplexities": {"original": Perplexity(value=12.5, standard_error=0.25, tokens=100)},
        "parameters": 1024,
        "palettized_parameters": 512,
        "bits_per_weight": 4.5,
        "size_bytes": 2_000_000,
        "predicted_size_bytes": 1_990_000,
        "tensors": [tensor(0), tensor(1)],
        "provenance": {"seed": 3},
    }
    return Report(**{**fields, **changes})


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({"bytes": "PASS", "execution-a": "PASS"}, Verdict.PASS),
        ({"bytes": "PASS", "execution-a": "PASS", "execution-b": "NOT RUN"}, Verdict.PASS),
        ({"bytes": "PASS", "execution-a": "PASS", "soft": "REPORTED"}, Verdict.PASS),
        # the quality is another question
        ({"bytes": "PASS", "execution-a": "PASS", "palettization": "BEYOND"}, Verdict.PASS),
        ({"bytes": "PASS", "execution-a": "FAIL", "execution-b": "PASS"}, Verdict.FAIL),
        ({"bytes": "FAIL", "execution-a": "PASS"}, Verdict.FAIL),
        # what was read wrong is exported wrong
        ({"source": "FAIL", "bytes": "PASS", "execution-a": "PASS"}, Verdict.FAIL),
        # right bytes that were never run prove nothing of what is computed, and running proves nothing of the bytes
        ({"bytes": "PASS", "execution-a": "NOT RUN", "palettization": "WITHIN"}, Verdict.NOT_RUN),
        ({"bytes": "NOT RUN", "execution-a": "PASS"}, Verdict.NOT_RUN),
        ({}, Verdict.NOT_RUN),
    ],
)
def test_faithful_export(verdicts, expected):
    assert (
        faithful_export([rung(Verdict(verdict), id=name) for name, verdict in verdicts.items()]) is expected
    )


def test_quality_is_that_of_palettization():
    others = [rung(Verdict.FAIL), rung(Verdict.REPORTED, id="soft")]
    assert quality(others) is Verdict.NOT_RUN
    for found in (Verdict.WITHIN, Verdict.BEYOND, Verdict.REPORTED, Verdict.NOT_RUN):
        assert quality([*others, rung(found, id="palettization")]) is found


@pytest.mark.parametrize(
    ("faithful", "found", "failed"),
    [
        ("PASS", "WITHIN", False),
        ("PASS", "REPORTED", False),
        ("PASS", "NOT RUN", False),
        ("PASS", "BEYOND", True),
        ("FAIL", "WITHIN", True),
        ("NOT RUN", "WITHIN", True),
    ],
)
def test_what_fails_a_command(faithful, found, failed):
    assert report(faithful_export=faithful, quality=found).failed is failed


def measured(verdict: Verdict, limit: float | None, source: str = "the default for 4 bits") -> Report:
    measures = {
        "perplexity_ratio": 1.25,
        "perplexity_limit": limit,
        "perplexity_limit_source": source,
        "top1_agreement": 0.75,
    }
    rungs = [rung(), rung(verdict, id="palettization", candidate="hard PyTorch", measures=measures)]
    both = {
        name: Perplexity(value=value, standard_error=0.25, tokens=100)
        for name, value in (("original", 12.0), ("hard PyTorch", 15.0))
    }
    return report(quality=verdict, rungs=rungs, perplexities=both)


def test_quality_says_its_limit_and_who_set_it():
    within, beyond = measured(Verdict.WITHIN, 1.5), measured(Verdict.BEYOND, 1.1, "--max-perplexity-ratio")
    assert quality_words(within).endswith(
        "1.25 times the original's, within the limit of 1.5 (the default for 4 bits)."
    )
    assert "beyond the limit of 1.1 (--max-perplexity-ratio)" in quality_words(beyond)
    assert "no limit is set for it" in quality_words(measured(Verdict.REPORTED, None))
    assert "not compared with" in quality_words(report(quality=Verdict.NOT_RUN))
    text = markdown(within)
    assert "**Quality: WITHIN.**" in text and "top-1 agreement with the original: 75.0%" in text
    page = within.html()
    assert "×1.25" in page and "limit ×1.5" in page and "75.0%" in page


def test_parts_of_the_tally_add_up():
    rungs = [
        rung(),
        rung(Verdict.WITHIN),
        rung(Verdict.BEYOND),
        rung(Verdict.REPORTED),
        rung(Verdict.NOT_RUN),
    ]
    made = report(rungs=rungs)
    words = "5 rungs: 2 passed, 1 failed, 1 reported without a threshold, 1 not run"
    assert tally(made) == words
    assert words in markdown(made) and words in made.html() and words not in one_line(made)
    assert tally(report(rungs=[rung()])) in one_line(report(rungs=[rung()]))


def test_one_line_begins_with_both_verdicts():
    assert one_line(report()).startswith(
        "faithful export PASS, quality WITHIN: model.mlpackage: 2 of 2 tensors"
    )
    failed = report(faithful_export=Verdict.FAIL, rungs=[rung(Verdict.FAIL, detail="2 faults")])
    assert (
        one_line(failed)
        == "faithful export FAIL, quality WITHIN: model.mlpackage: decoded artifact: 2 faults"
    )
    assert "Failed: decoded artifact." in faithful_words(failed)


# Older reports, and paths


def older(**changes: Any) -> dict[str, Any]:
    """A report of version 4."""
    fields = json.loads(report().model_dump_json())
    for name in ("date", "faithful_export", "quality", "continuations", "time_budget"):
        del fields[name]
    threshold = "perplexity at most 2 times the original's"
    rungs = [
        json.loads(rung().model_dump_json()),
        {
            **json.loads(rung(id="palettization").model_dump_json()),
            "threshold": threshold,
            "measures": {"perplexity_ratio": 1.5, "top1_agreement": 0.8},
            **changes,
        },
    ]
    whole = "FAIL" if changes.get("verdict") == "FAIL" else "PASS"
    return {**fields, "schema_version": 4, "verdict": whole, "rungs": rungs}


@pytest.mark.parametrize(
    ("before", "expected"), [("PASS", "WITHIN"), ("FAIL", "BEYOND"), ("NOT RUN", "NOT RUN")]
)
def test_reports_of_version_4_are_read(before, expected):
    """The quality was one of the rungs, and its failure that of the whole report."""
    found = Report.model_validate_json(json.dumps(older(verdict=before)))
    assert found.schema_version == SCHEMA_VERSION and found.date is None
    assert found.faithful_export is Verdict.PASS and found.quality.value == expected
    assert found.rungs[1].verdict.value == expected
    assert (found.perplexity_ratio, found.perplexity_limit) == (1.5, 2.0)
    assert expected in found.html() and expected in markdown(found)


def test_failed_reports_of_version_4_stay_failed():
    given = older()
    given["rungs"][0]["verdict"] = given["verdict"] = "FAIL"
    found = Report.model_validate(given)
    assert found.faithful_export is Verdict.FAIL and found.quality is Verdict.WITHIN


@pytest.mark.parametrize("version", [0, 1, SCHEMA_VERSION + 1, "5", None])
def test_unknown_versions_are_refused(version):
    with pytest.raises(ValueError, match="schema_version is"):
        Report.model_validate({**older(), "schema_version": version})


def test_no_absolute_path_is_in_a_report(tmp_path):
    secret = "/home/ann/My models/secret"
    made = report(
        artifact="model.mlpackage",
        not_run=[f"soft: {secret}/run: no such folder"],
        rungs=[
            rung(detail=f"{secret}/weight.bin: is damaged; see '/srv/other place/log.txt'"),
            rung(
                id="continuation",
                detail='token 1 is "/usr/bin"',
                measures={
                    "continuations": [
                        {"prompt": "/bin/sh x", "text": "", "tokens": 1, "equal_tokens": 1, "parted": None}
                    ]
                },
            ),
        ],
        continuations=[
            PromptTexts(
                prompt="/bin/sh x", tokens=1, original="/usr/bin", palettized="/usr/lib", shared_tokens=0
            )
        ],
        provenance={
            "command": ["edkm-export", "palettize", secret, "--calibration=/data/x y.txt", "a/b.txt"],
            "base_model": {"reference": f"{secret}/run"},
            "data": {"/data/one/a.txt": "1", "/data/two/a.txt": "2"},
            "url": "https://example.org/a/b",
        },
    )
    assert made.not_run == ["soft: run: no such folder"]
    assert made.rungs[0].detail == "weight.bin: is damaged; see 'log.txt'"
    assert made.provenance["command"][2:] == ["secret", "--calibration=x y.txt", "a/b.txt"]
    assert made.provenance["data"] == {"a.txt": "1", "a.txt (2)": "2"}
    assert made.provenance["url"] == "https://example.org/a/b"
    # what a model wrote is evidence, and stays
    assert made.rungs[1].detail == 'token 1 is "/usr/bin"' and made.continuations[0].original == "/usr/bin"
    write_report(made, tmp_path)
    for name in ("report.json", "report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "/home/ann" not in text and "/srv" not in text and "/data" not in text and "ann/My" not in text


def test_json_reads_back():
    made = report()
    assert Report.model_validate_json(made.model_dump_json()) == made
    assert json.loads(made.model_dump_json())["schema_version"] == SCHEMA_VERSION == 6
    assert json.loads(made.model_dump_json())["rungs"][0]["verdict"] == "PASS"


def test_numbers_that_json_lacks_read_back():
    """An output that overflowed has an infinite divergence: the report of it must be valid JSON."""
    far = Divergence(
        tokens=4,
        kl_mean=math.inf,
        kl_median=0.1,
        kl_p999=math.inf,
        kl_max=math.inf,
        top1_agreement=0,
        near_ties=0,
    )
    made = report(
        rungs=[rung(Verdict.FAIL, measures=far.model_dump())],
        perplexities={"executed": Perplexity(value=math.inf, standard_error=math.nan, tokens=4)},
        tensors=[tensor(0, weight_snr_db=math.inf), tensor(1, weight_snr_db=-math.inf)],
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = made.model_dump_json()
    json.loads(text, parse_constant=refuse)
    found = Report.model_validate_json(text)
    assert found.perplexities["executed"].value == math.inf
    assert math.isnan(found.perplexities["executed"].standard_error)
    assert [row.weight_snr_db for row in found.tensors] == [math.inf, -math.inf]
    assert found.rungs[0].measures["kl_median"] == 0.1
    assert float(found.rungs[0].measures["kl_mean"]) == math.inf


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="Extra inputs"):
        Report.model_validate({**report().model_dump(), "qualty": "WITHIN"})


def test_markdown_says_first_what_matters():
    text = markdown(report())
    lines = text.splitlines()
    assert lines[0] == "# Verification of model.mlpackage"
    assert lines[2].startswith("**Faithful export: PASS.**") and lines[4].startswith("**Quality: WITHIN.**")
    assert "- 2 of 2 palettized tensors bit-exact on disk" in lines
    assert "perplexity of original: 12.50 ± 0.25 (100 tokens predicted)" in text
    assert text.index("## Not run") < text.index("- Apple runtime: needs macOS") < text.index("## Ladder")
    assert "| decoded artifact | hard PyTorch | **PASS** | equal | 2 of 2 bit-exact |" in lines
    assert "- decoded artifact: conversion computes nothing." in lines


def test_markdown_when_everything_was_run():
    assert "Everything was run." in markdown(report(not_run=[]))


def test_markdown_lists_the_worst_weights():
    text = markdown(report(tensors=[tensor(index) for index in range(14)]))
    assert "The 10 worst weights" in text and "In decibels (dB)" in text
    assert "layers.9.weight" in text and "layers.10.weight" not in text
    assert text.index("layers.0.weight") < text.index("layers.1.weight")
    assert "All 14 are in report.json." in text


def test_page_and_markdown_have_one_order():
    """By the output where it was measured, even if the weights are ordered otherwise."""
    rows = [tensor(0, output_snr_db=9.0), tensor(1, output_snr_db=3.0), tensor(2, output_snr_db=6.0)]
    made = report(tensors=rows)
    table = made.html().split('id="weights"')[1]
    for text in (markdown(made).split("worst weights")[1], table):
        places = [text.index(f"layers.{index}.weight") for index in (1, 2, 0)]
        assert places == sorted(places)
    assert "output SNR" in markdown(made) and "output SNR" in made.html()


def test_texts_stand_side_by_side_and_tokens_are_quoted():
    parted = {"found": " a\n", "expected": " the", "near_tie": True, "hard_pytorch": None, "artifact": None}
    one = {"prompt": "Once`", "text": " upon the", "tokens": 2, "equal_tokens": 1, "parted": parted}
    made = report(
        rungs=[
            rung(
                id="continuation",
                candidate="greedy continuation: onnxruntime",
                measures={"continuations": [one]},
            ),
        ],
        continuations=[
            PromptTexts(
                prompt="Once`", tokens=2, original=" there\nwas", palettized=" upon the", shared_tokens=0
            )
        ],
    )
    told = (
        'onnxruntime: 1 of 2 tokens as the palettized model, then " a\\n" where that has " the", a near tie'
    )
    text = markdown(made)
    assert told in text and '``"Once`"``' in text and '- original: `" there\\nwas"`' in text
    page = made.html()
    assert html.escape(told, quote=False).replace('"', "&#34;") in page
    assert "<code> there\nwas</code>" in page and "<code> upon the</code>" in page
    assert "They begin with 0 of 2 tokens alike." in page


def test_what_a_time_budget_cut_is_said():
    made = report(time_budget=TimeBudget(minutes=2, cut=["onnxruntime: 128 of 1,024 tokens compared"]))
    for text in (markdown(made), made.html()):
        assert "2 minutes (--minutes); cut: onnxruntime: 128 of 1,024 tokens compared" in text
    assert "nothing was left out" in markdown(report(time_budget=TimeBudget(minutes=1, cut=[])))


def test_words_are_explained():
    for text in (markdown(report()), report().html()):
        for word, meaning in GLOSSARY.items():
            assert word in text and html.escape(meaning).replace("&#x27;", "&#39;") in text.replace(
                "'", "&#39;"
            )
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8").partition("## Words")[2]
    assert GLOSSARY.keys() <= {found.strip("*") for found in re.findall(r"^- (\*[^*]+\*):", page, flags=re.M)}


def test_markdown_without_the_original():
    text = markdown(report(tensors=[tensor(0, weight_snr_db=None, bit_exact=None)]))
    assert "## Palettized weights" in text and "| unknown |" in text


def test_markdown_of_a_weight_that_differs():
    text = markdown(report(tensors=[tensor(0, bit_exact=False), tensor(1)]))
    assert "- 1 of 2 palettized tensors bit-exact on disk" in text and "| **no** |" in text


def test_markdown_cells_cannot_break_the_table():
    text = markdown(report(rungs=[rung(detail="a|b\nc")]))
    assert r"a\|b c |" in text


def test_writing_replaces_older_reports(tmp_path):
    write_report(report(), tmp_path)
    write_report(report(faithful_export=Verdict.FAIL), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert Report.model_validate_json((tmp_path / "report.json").read_text()).failed
    assert "FAIL" in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[2]


# The published schema


SCHEMA = ROOT / "docs" / "report.schema.json"


def test_published_schema_is_that_of_the_code():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == Report.model_json_schema()


def test_reports_follow_the_published_schema():
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    infinite = report(
        perplexities={"executed": Perplexity(value=math.inf, standard_error=math.nan, tokens=4)},
        tensors=[tensor(0, weight_snr_db=-math.inf, output_snr_db=3.5), tensor(1, weight_snr_db=None)],
        sizes=[Size(part="LUTs", predicted_bytes=None, actual_bytes=3)],
        layer_errors={"hard PyTorch": [LayerError(layer="model.layers.0", snr_db=math.inf)]},
    )
    for made in (report(), infinite):
        jsonschema.validate(json.loads(made.model_dump_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(report().model_dump_json()), "quality": "FINE"}, schema)
