"""The report in headless Chromium: it renders, sorts, and says nothing on the console."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from converters.coreml.read.artifact import open_artifact
from edkm_export.artifact.metrics import Perplexity
from edkm_export.reference.soft_model import SoftWeights
from edkm_export.reference.source import Source
from edkm_export.verify.compare_models import Compared, Comparison, comparison_page
from edkm_export.verify.html import report_page
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.ladder import verify_artifact

pytestmark = pytest.mark.browser

WIDTHS = {"desk": 1200, "phone": 360}
PHONE_HEIGHT = 5000  # px; before long parts were folded it was above 10,000


@pytest.fixture(scope="module")
def page_file(tiny_export, tiny_llama, held_out, tmp_path_factory) -> Path:
    # A soft model that is hard, so that every verdict there is but FAIL stands on the page.
    soft = SoftWeights("made up", lambda: iter(()))
    evaluation = VerificationInputs(
        held_out, "words", tokens=128, original=Source.parse(str(tiny_llama)), soft=soft
    )
    report = verify_artifact(tiny_export.checkpoint, open_artifact(tiny_export.package), evaluation)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page(report), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        # A container's root has no sandbox; None: the browser that playwright brought itself.
        started = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, page_file):
    """Open the page; what it says on the console, and what it asks the network for, is collected."""
    contexts = []

    def run(width: str = "desk", scheme: str = "light", path: Path = page_file) -> tuple[Any, list[str]]:
        context = browser.new_context(
            viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page, said

    yield run
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_comparison_renders(visit, width, scheme, tmp_path):
    found = Perplexity(value=12.0, standard_error=0.5, tokens=100)
    rows = [
        Compared("original", "float model", None, None, found, None),
        *(Compared(f"model-{n}", "checkpoint", 4.0 - n, 1000 * n, found, None) for n in (3, 1, 2)),
    ]
    path = tmp_path / "compare.html"
    path.write_text(comparison_page(Comparison(rows, "words", 100, 100)), encoding="utf-8")
    page, said = visit(width, scheme, path)
    assert [line for line in said if not line.startswith("data:")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert page.get_by_role("img", name="Perplexity against size: model-3 0.0 MB, 12.00").count() == 1
    page.get_by_role("button", name="bits a weight").click()
    names = page.locator("tbody tr > :first-child").all_inner_texts()
    assert names == ["model-3", "model-2", "model-1", "original"]  # what has no bits comes last


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_renders_without_errors_and_without_a_network(visit, width, scheme):
    page, said = visit(width, scheme)
    assert [line for line in said if not line.startswith("data:")] == []
    assert page.locator("header .chip").all_inner_texts() == ["PASS", "WITHIN"]
    assert page.locator("h1").inner_text() == "model.mlpackage"
    # nothing sticks out to the side
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]


def test_verdicts_and_what_was_not_run_come_first(visit):
    page, _ = visit()
    headings = [" ".join(text.split()) for text in page.locator("h2").all_inner_texts()]
    assert headings[:3] == ["Faithful export PASS", "Quality WITHIN", "Not run"]
    assert page.locator("header .chip").first.bounding_box()["y"] < 160


def test_what_is_long_is_folded_on_a_phone(visit):
    page, _ = visit("phone")
    assert page.evaluate("document.documentElement.scrollHeight") < PHONE_HEIGHT
    table = page.locator("#weights")
    assert not table.is_visible() and page.locator("details.fold[open]").count() == 0
    page.get_by_text("the worst first", exact=False).locator("visible=true").last.click()
    assert table.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS["phone"]


def test_what_is_long_is_open_where_there_is_room(visit):
    page, _ = visit()
    assert page.locator("#weights").is_visible() and page.locator("details.fold:not([open])").count() == 0


def test_rungs_open_one_by_one_and_together(visit):
    page, _ = visit("phone")
    rungs = page.locator("details.rung")
    assert rungs.count() > 8 and page.locator("details.rung[open]").count() == 0
    rungs.first.locator("summary").click()
    assert page.locator("details.rung[open]").count() == 1
    assert "because" in rungs.first.inner_text()
    button = page.get_by_role("button", name="Open all")
    button.click()
    assert page.locator("details.rung[open]").count() == rungs.count()
    page.get_by_role("button", name="Close all").click()
    assert page.locator("details.rung[open]").count() == 0


def test_light_and_dark_differ_and_can_be_read(visit):
    """Contrast of text as WCAG 2.1 asks: at least 4.5 to 1."""
    backgrounds = []
    for scheme in ("light", "dark"):
        page, _ = visit(scheme=scheme)
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ratios = page.evaluate(
            """() => {
              const light = (css) => {
                const [r, g, b] = css.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
                  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const back = (e) => { for (; e; e = e.parentElement) {
                const css = getComputedStyle(e).backgroundColor;
                if (css !== "rgba(0, 0, 0, 0)") return css; } };
              return [...document.querySelectorAll("h1, h2, td, th, p, .chip, .soft, dd, dt, figcaption")].map((e) => {
                const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05);
              });
            }"""
        )
        assert len(ratios) > 100 and min(ratios) >= 4.5
    assert backgrounds[0] != backgrounds[1]


def column(page: Any, number: int) -> list[str]:
    return page.locator(f"#weights tbody tr > :nth-child({number})").all_inner_texts()


def test_worst_layers_come_first_and_headings_sort(visit):
    page, said = visit()
    decibels = [float(text) for text in column(page, 2)]
    assert decibels == sorted(decibels) and len(decibels) == 29
    names = column(page, 1)
    heading = page.locator("#weights thead th").nth(0)
    heading.locator("button").click()
    assert column(page, 1) == sorted(names) and heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")  # by keyboard as well
    assert (
        column(page, 1) == sorted(names, reverse=True) and heading.get_attribute("aria-sort") == "descending"
    )
    luts = page.locator("#weights thead th").nth(4)
    luts.locator("button").click()
    numbers = [int(text.replace(",", "")) for text in column(page, 5)]
    assert numbers == sorted(numbers)  # as numbers, not as words
    assert heading.get_attribute("aria-sort") is None and said in ([], ["data:,"])


def test_names_can_be_filtered(visit):
    page, _ = visit()
    page.get_by_label("Show names with").fill("layers.1.mlp")
    shown = page.locator("#weights tbody tr:visible").all_inner_texts()
    assert len(shown) == 3 and all("layers.1.mlp" in text for text in shown)


def test_plots_have_accessible_names(visit):
    page, _ = visit()
    plots = page.locator("svg")
    assert plots.count() >= 11  # KL of five comparisons, error by layer, LUTs of six weights at most
    names = [plot.get_attribute("aria-label") for plot in plots.all()]
    assert all(names) and len(set(names)) == len(names)
    assert page.get_by_role("img", name="Distribution of the KL divergence").count() == 5
    assert page.get_by_role("img", name="LUT entries as lines").count() >= 5
    assert page.get_by_role("img", name="Signal to noise ratio of the hidden states").count() == 1
    assert all(plot.bounding_box()["width"] > 200 for plot in plots.all())
