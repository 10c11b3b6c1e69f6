"""Reports of older schema versions as today's, so that what was written once can still be read."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["upgrade"]

_OLDEST = 2
_LAST_WITHOUT_TASKS = 5
_QUALITY = {"PASS": "WITHIN", "FAIL": "BEYOND"}


def upgrade(given: dict[str, Any], current: int) -> dict[str, Any]:
    """A report as the current version has it.

    Before version 6 there were no tasks. Before version 5 there was one `verdict` of all rungs, and `palettization`
    was PASS or FAIL.

    Args:
        given: the fields of a report.
        current: version of the schema.

    Raises:
        ValueError: it is newer than this release, or older than any that was published.
    """
    version = given.get("schema_version", current)
    if version == current:
        return given
    if not isinstance(version, int) or not _OLDEST <= version < current:
        raise ValueError(
            f"schema_version is {version!r}; this release of edkm-export reads {_OLDEST} to {current}. "
            "Verify the artifact again, or read the report with the release that wrote it."
        )
    if version == _LAST_WITHOUT_TASKS:
        return {**given, "schema_version": current}
    rungs = [_of_two_verdicts(rung) for rung in given.get("rungs", [])]
    verdicts = {rung["id"]: rung["verdict"] for rung in rungs}
    whole = given.get("verdict")
    found = {key: value for key, value in given.items() if key != "verdict"}
    faithful = whole if whole != "FAIL" or "FAIL" in verdicts.values() else "PASS"
    return {
        **found,
        "schema_version": current,
        "rungs": rungs,
        "faithful_export": faithful,
        "quality": verdicts.get("palettization", "NOT RUN"),
    }


def _of_two_verdicts(rung: dict[str, Any]) -> dict[str, Any]:
    if rung.get("id") != "palettization":
        return rung
    measures = dict(rung.get("measures") or {})
    limit = re.match(r"perplexity at most ([\d.e+-]+) times", str(rung.get("threshold")))
    if measures and limit:
        measures["perplexity_limit"] = float(limit[1])
    return {**rung, "verdict": _QUALITY.get(rung["verdict"], rung["verdict"]), "measures": measures}
