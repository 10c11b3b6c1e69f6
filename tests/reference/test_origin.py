"""Licence and hub id, as folders and GGUF files name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edkm_export.reference.origin import Origin, folder_origin, gguf_origin
from edkm_export.reference.source import Source, account
from tests.helpers.paths import FIXTURES

CARD = """---
license: apache-2.0
base_model: some-one/Small
---
# Words
license: mit
"""


def of(folder: Path, card: str = "", license_text: str = "", **config: Any) -> Origin:
    folder.mkdir(parents=True, exist_ok=True)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    if license_text:
        (folder / "LICENSE").write_text(license_text, encoding="utf-8")
    return folder_origin(folder, config)


def test_model_card(tmp_path):
    assert of(tmp_path, CARD) == Origin(
        "apache-2.0", "", "", "its model card", ("some-one/Small",), "base_model of its model card"
    )


def test_nothing(tmp_path):
    assert of(tmp_path, "# only words\nlicense: mit\n") == Origin()
    assert Origin().provenance() == {}


def test_licence_beside_the_card_of_a_known_model(tmp_path):
    card = "---\nlicense: other\nlicense_name: small-terms\nlicense_link: LICENSE\n---\n"
    found = of(tmp_path, card, _name_or_path="some-one/Small")
    assert found.license == "other" and found.license_name == "small-terms"
    assert found.license_link == "https://huggingface.co/some-one/Small/blob/main/LICENSE"
    assert of(tmp_path / "unknown", card).license_link == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("                 Apache License\n           Version 2.0, January 2004\n", "apache-2.0"),
        ("MIT License\n\nCopyright (c) someone\n", "mit"),
        ("# The MIT License (MIT)\n", "mit"),
        ("BSD 3-Clause License\n", "bsd-3-clause"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007\n", "gpl-3.0"),
        ("Gemma Terms of Use\n\nLast modified\n", "gemma"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date", "llama3.2"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "llama3"),
        ("Our own terms\n", "other"),
        ("MIT Licensed, mostly\n", "other"),
        ("Apache License\nVersion 2.00\n", "other"),
    ],
)
def test_licence_file_by_its_title(tmp_path, text, expected):
    found = of(tmp_path, license_text=text)
    assert (found.license, found.license_from) == (expected, "LICENSE")
    assert bool(found.license_name) is (expected == "other")


def test_card_before_licence_file(tmp_path):
    assert of(tmp_path, CARD, "MIT License\n").license == "apache-2.0"


@pytest.mark.parametrize(
    ("inside", "config", "expected"),
    [
        ("models--some-one--Tiny-1/snapshots/0123", {"_name_or_path": "x/y"}, "some-one/Tiny-1"),
        ("plain", {"_name_or_path": "x/y"}, "x/y"),
        ("plain", {"_name_or_path": "/home/me/x/y"}, "some-one/Small"),
        ("plain", {"_name_or_path": "./x"}, "some-one/Small"),
        ("plain", {"_name_or_path": 3}, "some-one/Small"),
        ("plain", {}, "some-one/Small"),
    ],
)
def test_base_model(tmp_path, inside, config, expected):
    """Its place in the hub's cache, else its configuration, else its card."""
    assert of(tmp_path / inside, CARD, **config).base_models == (expected,)


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: mit\n",
        "---\nlicense: {a: b}\nbase_model: 3\n---\n",
        "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
        '---\nlicense: "a\\0b"\nbase_model: [3, ../x, a/b/c]\n---\n',
        "---\n" + "[" * 5000 + "\n---\n",
    ],
)
def test_cards_that_are_none(tmp_path, card):
    assert of(tmp_path, card) == Origin()


def test_long_values_are_no_licence(tmp_path):
    assert of(tmp_path, f"---\nlicense: {'a' * 5000}\n---\n") == Origin()


@pytest.mark.parametrize(
    ("metadata", "base_models"),
    [
        ({"general.source.huggingface.repository": "some-one/Tiny"}, ("some-one/Tiny",)),
        ({"general.source.repo_url": "https://huggingface.co/some-one/Tiny"}, ("some-one/Tiny",)),
        ({"general.source.url": "https://huggingface.co/some-one/Tiny/tree/main"}, ("some-one/Tiny",)),
        (
            {
                "general.base_model.count": 2,
                "general.base_model.0.repo_url": "https://huggingface.co/some-one/Tiny",
                "general.base_model.1.repo_url": "https://hf.co/other/Small",
                "general.base_model.2.repo_url": "https://hf.co/not/counted",
            },
            ("some-one/Tiny", "other/Small"),
        ),
        ({"general.base_model.count": 1, "general.base_model.0.name": "Tiny"}, ()),
        ({"general.base_model.count": 1, "general.base_model.0.repo_url": "https://x.org/some-one/Tiny"}, ()),
        (
            {
                "general.base_model.count": 1,
                "general.base_model.0.repo_url": "https://huggingface.co/datasets/x",
            },
            (),
        ),
        ({"general.base_model.count": 10**12}, ()),
        ({"general.base_model.count": "2"}, ()),
        ({"general.source.repo_url": 3}, ()),
        ({"general.source.repo_url": "https://[huggingface.co/a/b"}, ()),
    ],
)
def test_gguf_base_models(metadata, base_models):
    assert gguf_origin(metadata).base_models == base_models


def test_gguf_licence():
    metadata = {
        "general.license": "other",
        "general.license.name": "small-terms",
        "general.license.link": "https://x.org/terms",
    }
    found = gguf_origin(metadata)
    assert found.provenance() == {
        "license": {
            "id": "other",
            "name": "small-terms",
            "link": "https://x.org/terms",
            "from": "general.license of the GGUF file",
        }
    }
    assert gguf_origin({"general.license": ["mit", "apache-2.0"]}).license == "mit AND apache-2.0"
    assert gguf_origin({"general.license": 3}) == Origin()


def test_account_carries_it(tmp_path, small_folder):
    """Of a whole folder, into the provenance of whatever is made of it."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    (folder / "README.md").write_text(CARD)
    assert account(Source.parse(str(folder))).provenance()["license"] == {
        "id": "apache-2.0",
        "from": "its model card",
    }
    assert "license" not in account(Source.parse(str(FIXTURES / "tiny-llama"))).provenance()
