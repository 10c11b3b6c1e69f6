"""The page as text; test_browser.py looks at it in a browser."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from test_report import report, rung, tensor

from edkm_export.verify import charts
from edkm_export.verify.html import report_page
from edkm_export.verify.report import Fault, LayerError, Size, Verdict, WeightPlot

PLOT = WeightPlot(
    name="layers.0.weight",
    group=(1, 0),
    source="original",
    low=-1.0,
    high=2.0,
    counts=[0, 3, 5, 1],
    lut=[-0.5, 0.25, 1.0],
    used=[4, 5, 0],
)


class Balanced(HTMLParser):
    """Checks that every element is closed where it should be."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attributes if key in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_page_is_one_file():
    parser = parse(report_page(report(weight_plots=[PLOT])))
    assert parser.links == ["data:,"]  # the icon; nothing is loaded
    assert "default-src 'none'" in report_page(report())


def test_verdicts_come_first_then_what_was_not_run():
    rungs = [rung(Verdict.NOT_RUN, detail="needs macOS"), rung(Verdict.FAIL)]
    page = report_page(report(rungs=rungs, quality=Verdict.BEYOND))
    assert (
        page.index("Faithful export") < page.index("BEYOND", page.index("<h1>")) < page.index('id="not-run"')
    )
    assert page.index("Failed: decoded artifact.") < page.index("needs macOS") < page.index('id="ladder"')


def test_date_and_layers():
    errors = {"hard PyTorch": [LayerError(layer=f"model.layers.{n}", snr_db=9.0 + n) for n in range(30)]}
    page = report_page(report(date="2026-11-30T09:12:44+00:00", layer_errors=errors))
    assert "verified 2026-11-30 09:12 UTC" in page
    assert "layer, 0 to 29" in page and "after layers 0 to 29" in page
    axis = re.findall(r'text-anchor="middle">(\d+)</text>', page.split("hidden states after layers")[1])
    assert axis[0] == "0" and axis[-1] == "29" and "30" not in axis


def test_names_cannot_break_the_page():
    evil = "<script>alert(1)</script>\"'&"
    page = report_page(
        report(
            artifact=evil,
            rungs=[rung(detail=evil)],
            tensors=[tensor(0, name=evil)],
            weight_plots=[PLOT.model_copy(update={"name": evil})],
            layer_errors={evil: [LayerError(layer=evil, snr_db=3.0)]},
            provenance={"base_model": {"reference": evil}, "note": evil},
        )
    )
    parse(page)
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)") >= 6


def test_worst_weights_come_first():
    tensors = [
        tensor(0, output_snr_db=20.0),
        tensor(1, output_snr_db=5.0),
        tensor(2, output_snr_db=math.inf),
        tensor(3, output_snr_db=30.0, bit_exact=False),
        tensor(4, output_snr_db=None, weight_snr_db=None),
    ]
    table = report_page(report(tensors=tensors)).split('id="weights"')[1]
    names = re.findall(r"layers\.\d\.weight", table)
    assert names == [f"layers.{index}.weight" for index in (3, 1, 0, 2, 4)]
    assert 'aria-sort="ascending"' in table and ">exact</td>" in table


def test_sizes_and_faults_are_told():
    fault = Fault(
        execution="execution-float32",
        module="model.layers.1.mlp",
        op="mul 'x' (line 3)",
        what="what goes into the projection is wrong",
        error=0.5,
        tolerance=0.002,
        candidates=["mul 'x' (line 3)"],
    )
    page = report_page(
        report(faults=[fault], sizes=[Size(part="LUTs", predicted_bytes=1000, actual_bytes=1100)])
    )
    assert "+10.00%" in page and "1,100" in page
    assert page.index("model.layers.1.mlp") < page.index('id="ladder"')


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_do_not_break_plots(value: Any):
    svg = charts.layer_lines({"a": [LayerError(layer="0", snr_db=value), LayerError(layer="1", snr_db=3.0)]})
    assert "nan" not in svg and 'points="' in svg
    parse(svg)
    parse(charts.kl_histogram("x", [0, 1, 2] + [0] * 25, value, None))
    parse(
        charts.size_against_quality([charts.Point("a", 1e6, value, value), charts.Point("b", 2e6, 3.0, 0.1)])
    )


def test_a_weight_of_one_value_can_be_drawn():
    flat = PLOT.model_copy(update={"low": 0.0, "high": 1e-9, "counts": [7], "lut": [0.0], "used": [7]})
    parse(charts.weight_histogram(flat))


def test_plots_name_what_they_show():
    svg = charts.weight_histogram(PLOT)
    assert 'role="img"' in svg
    assert "histogram of 9 original weights with the 3 LUT entries as lines, 1 of them dead" in svg
    assert svg.count('class="dead"') == 1 and svg.count('class="entry"') == 2
