"""The table of docs/families.md is made from the list of families."""

from __future__ import annotations

from edkm_export.decoder.families import FAMILIES
from tests.helpers.family_table import PAGE, table


def test_every_family_says_what_it_is():
    for kind, family in FAMILIES.items():
        assert family.models and family.__doc__ and "\n\n" not in family.__doc__.strip(), kind


def test_table_is_up_to_date():
    message = "run python -m tests.helpers.family_table, which writes the table"
    assert table() in PAGE.read_text(encoding="utf-8"), message
