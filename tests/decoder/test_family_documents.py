"""The tables of docs/families.md are made from the list of families and from what the tests run."""

from __future__ import annotations

from edkm_export.decoder.families import FAMILIES
from edkm_export.reference.gguf.architectures import ARCHITECTURES as READERS
from tests.helpers.family_table import PAGE, cells, table
from tests.helpers.gguf_kinds import KINDS
from tests.helpers.gguf_newer_kinds import NEWER
from tests.helpers.gguf_writer import ARCHITECTURES


def test_every_family_says_what_it_is():
    for kind, family in FAMILIES.items():
        assert family.models and family.__doc__ and "\n\n" not in family.__doc__.strip(), kind


def test_tables_are_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    message = "run python -m tests.helpers.family_table, which writes the tables"
    assert table() in page, message
    assert cells() in page, message


def test_architectures_of_the_table_are_read():
    """llama.cpp's name beside a family: a file of such a model is read in `test_gguf_kinds`, and gives that family."""
    read = {kind.family for kind in (KINDS | NEWER).values() if kind.refused is None}
    named = ARCHITECTURES.keys() & FAMILIES.keys()
    assert named <= read
    assert {ARCHITECTURES[kind] for kind in named} <= READERS.keys()
