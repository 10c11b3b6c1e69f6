"""The ladder as JUnit XML, which build servers show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from edkm_export.verify.report import Report, Rung, Verdict
from edkm_export.verify.verdicts import faithful_words, quality_words

__all__ = ["junit"]

_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # XML 1.0 has no such characters


def junit(report: Report) -> str:
    """One test case for each of the two verdicts and for each rung.

    FAIL and BEYOND are failures, NOT RUN is skipped with its reason; a faithful export that is not proved is a failure.
    """
    cases = [*_verdicts(report), *(_rung(report, rung) for rung in report.rungs)]
    suite = ElementTree.Element(
        "testsuite",
        name=_clean(f"verification of {report.artifact}"),
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        skipped=str(sum(case.find("skipped") is not None for case in cases)),
        errors="0",
    )
    if report.date:
        suite.set("timestamp", report.date)
    suite.extend(cases)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def _verdicts(report: Report) -> list[ElementTree.Element]:
    return [
        _case(report, "faithful export", report.faithful_export, faithful_words(report), required=True),
        _case(report, "quality", report.quality, quality_words(report)),
    ]


def _rung(report: Report, rung: Rung) -> ElementTree.Element:
    more = f"threshold: {rung.threshold}\n({rung.why})"
    return _case(report, f"{rung.id}: {rung.candidate}", rung.verdict, rung.detail, more)


def _case(
    report: Report, name: str, verdict: Verdict, words: str, more: str = "", *, required: bool = False
) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=_clean(report.artifact), name=_clean(name))
    if verdict.is_bad or (required and not verdict.is_good):
        failure = ElementTree.SubElement(case, "failure", type=verdict.value, message=_clean(words))
        failure.text = _clean(f"{words}\n\n{more}".strip())
    elif verdict is Verdict.NOT_RUN:
        ElementTree.SubElement(case, "skipped", message=_clean(words))
    else:
        ElementTree.SubElement(case, "system-out").text = _clean(f"{verdict.value}: {words}")
    return case


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
