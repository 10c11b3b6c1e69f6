"""The ladder as JUnit XML, which build servers show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from edkm_export.verify.report import Report, Verdict

__all__ = ["junit"]

_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # XML 1.0 has no such characters


def junit(report: Report) -> str:
    """One test case for each rung: FAIL is a failure, NOT RUN is skipped with its reason."""
    verdicts = [rung.verdict for rung in report.rungs]
    suite = ElementTree.Element(
        "testsuite",
        name=_clean(f"verification of {report.artifact}"),
        tests=str(len(verdicts)),
        failures=str(verdicts.count(Verdict.FAIL)),
        skipped=str(verdicts.count(Verdict.NOT_RUN)),
        errors="0",
    )
    for rung in report.rungs:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_clean(report.artifact), name=f"{rung.id}: {rung.candidate}"
        )
        if rung.verdict is Verdict.FAIL:
            failure = ElementTree.SubElement(case, "failure", message=_clean(rung.detail))
            failure.text = _clean(f"{rung.detail}\n\nthreshold: {rung.threshold}\n({rung.why})")
        elif rung.verdict is Verdict.NOT_RUN:
            ElementTree.SubElement(case, "skipped", message=_clean(rung.detail))
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(rung.detail)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
