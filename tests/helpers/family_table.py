"""The table of docs/families.md; `python -m tests.helpers.family_table` writes it into the page."""

from __future__ import annotations

import re

from edkm_export.decoder.families import FAMILIES
from tests.helpers.paths import ROOT

__all__ = ["PAGE", "table"]

PAGE = ROOT / "docs" / "families.md"
_HEAD = "| `model_type` | models | what the decoder does for it |\n|---|---|---|\n"


def table() -> str:
    """Its lines, one a family, from what each one says of itself."""
    rows = []
    for kind, family in FAMILIES.items():
        words = " ".join((family.__doc__ or "").split()).removesuffix(".")
        rows.append(f"| `{kind}` | {family.models} | {words} |\n")
    return _HEAD + "".join(rows)


def main() -> None:
    """Put the table in the place of the one that the page has."""
    page = PAGE.read_text(encoding="utf-8")
    made, count = re.subn(re.escape(_HEAD) + r"(\|.*\n)*", lambda _found: table(), page)
    assert count == 1, f"{PAGE} has no such table"
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
