"""The tables of docs/families.md; `python -m tests.helpers.family_table` writes them into the page."""

from __future__ import annotations

import re

from edkm_export.decoder.families import FAMILIES
from tests.helpers.family_cells import CELLS, COLUMNS, REFUSALS
from tests.helpers.gguf_writer import ARCHITECTURES
from tests.helpers.paths import ROOT

__all__ = ["PAGE", "cells", "table"]

PAGE = ROOT / "docs" / "families.md"
_HEAD = "| `model_type` | models | what the decoder does for it |\n|---|---|---|\n"


def table() -> str:
    """Its lines, one a family, from what each one says of itself."""
    rows = []
    for kind, family in FAMILIES.items():
        words = " ".join((family.__doc__ or "").split()).removesuffix(".")
        rows.append(f"| `{kind}` | {family.models} | {words} |\n")
    return _HEAD + "".join(rows)


_CELLS_HEAD = "| `model_type` | "


def cells() -> str:
    """Families by formats and interfaces: what runs each cell, or the number of the reason why none does."""
    names = [f"{column.format} `{column.name}`" for column in COLUMNS]
    lines = [_CELLS_HEAD + " | ".join([*names, "from GGUF"]) + " |\n", "|---" * (len(names) + 2) + "|\n"]
    for kind in dict.fromkeys(cell.kind for cell in CELLS):
        found = []
        for cell in CELLS:
            if cell.kind == kind and cell.refusal is not None:
                found.append(f"no ({REFUSALS.index(cell.refusal) + 1})")
            elif cell.kind == kind:
                found.append("yes" if cell.quick else "slow")
        found.append(f"`{ARCHITECTURES[kind]}`" if kind in ARCHITECTURES else "no")
        lines.append(f"| `{kind}` | " + " | ".join(found) + " |\n")
    reasons = "".join(f"{number}. {each.reason}\n" for number, each in enumerate(REFUSALS, 1))
    return "".join(lines) + "\n" + reasons


def main() -> None:
    """Put the tables in the place of those that the page has."""
    page = PAGE.read_text(encoding="utf-8")
    made, count = re.subn(re.escape(_HEAD) + r"(\|.*\n)*", lambda _found: table(), page)
    assert count == 1, f"{PAGE} has no such table"
    old = re.escape(f"{_CELLS_HEAD}{COLUMNS[0].format}") + r".*\n(\|.*\n)*\n(\d+\. .*\n)*"
    made, count = re.subn(old, lambda _found: cells(), made)
    assert count == 1, f"{PAGE} has no such table of formats"
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
