"""The model card: what a hub reads of it, and that values of strangers stay data."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml

from edkm_export.checkpoint import Checkpoint
from edkm_export.model_card import (
    FormatCard,
    base_models,
    card_license,
    card_verdict,
    code,
    model_card,
    with_verification,
)
from tests.helpers.checkpoint_files import make_checkpoint

FORM = FormatCard("onnx", ["onnx"], "An ONNX decoder", {"positions": "512"}, {"Use": "as you like"})


def made(**provenance: Any) -> Checkpoint:
    return dataclasses.replace(make_checkpoint(), provenance=provenance)


def card(checkpoint: Checkpoint, name: str = "model") -> str:
    return model_card(checkpoint, name, FORM, "PASS", "Verdict: **PASS**.")


def front(text: str) -> dict[str, Any]:
    """What a hub reads: the YAML between the first two lines of dashes."""
    found = re.fullmatch(r"---\n(.*?\n)---\n.*", text, flags=re.DOTALL)
    assert found is not None
    read: dict[str, Any] = yaml.safe_load(found[1])
    return read


def test_all_that_is_known():
    checkpoint = made(
        source={
            "license": {"id": "apache-2.0", "from": "its model card"},
            "base_models": {"ids": ["some-one/Small-1B"], "from": "the hub"},
        }
    )
    text = card(checkpoint)
    assert front(text) == {
        "license": "apache-2.0",
        "base_model": "some-one/Small-1B",
        "base_model_relation": "quantized",
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "palettization", "edkm-export"],
        "quantization": {
            "method": "palettization",
            "bits": [3, 4],
            "bits_per_weight": round(checkpoint.bits_per_weight, 2),
        },
    }
    assert "from [some-one/Small-1B](https://huggingface.co/some-one/Small-1B)." in text
    assert "Licence: apache-2.0, as its model card says. It holds for this model, too." in text
    assert f"| parameters | {checkpoint.numel:,} (108 palettized) |" in text
    assert "| positions | 512 |" in text and "## Use\n\nas you like" in text
    assert card_license(text) == "apache-2.0" and card_verdict(text) == "PASS"


def test_nothing_is_known():
    text = card(made())
    assert not {"license", "license_name", "base_model", "base_model_relation"} & front(text).keys()
    assert "The licence of the original is not known" in text and "`license:`" in text
    assert card_license(text) is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"id": "Apache-2.0"}, {"license": "apache-2.0"}),
        ({"id": "gemma", "link": "https://ai.google.dev/gemma/terms"}, {"license": "gemma"}),
        (
            {"id": "other", "name": "small-model-license", "link": "https://x.org/license"},
            {
                "license": "other",
                "license_name": "small-model-license",
                "license_link": "https://x.org/license",
            },
        ),
        ({"id": "MIT OR Apache-2.0"}, {"license": "other", "license_name": "mit-or-apache-2.0"}),
        ({"id": "!"}, {"license": "other", "license_name": "unnamed"}),
        ({"id": ""}, {}),
        ({"id": 3}, {}),
        ("mit", {}),
        (None, {}),
    ],
)
def test_licences(said, expected):
    """What a hub has an identifier for, what it calls "other", and what is none."""
    read = front(card(made(source={"license": said})))
    assert {name: value for name, value in read.items() if name.startswith("license")} == expected


HOSTILE = [
    "x: [y",
    "no",
    "1e5",
    "---",
    "a\n---\n# Heading",
    "# comment",
    "{{a}}",
    "!!python/object/apply:os.system [ls]",
    "<script>alert(1)</script>",
    "](https://evil.example)[",
    "`code`",
    "| cell |",
    "*a*",
    "\"quoted\" 'twice'",
    "-->",
    "日本語 ünïcode",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_values_of_strangers_stay_data(value):
    """As a licence, a model's name and a recipe's: the front matter keeps its keys, the page its headings."""
    checkpoint = dataclasses.replace(
        made(
            source={"license": {"id": "other", "name": value, "from": value, "link": value}},
            base_model={"reference": value},
        ),
        recipe={"name": value},
    )
    text, plain = card(checkpoint, value), card(made(source={"license": {"id": "other", "name": "x"}}))
    read = front(text)
    assert read["license_name"] == " ".join(value.split()) and read.keys() == front(plain).keys()
    body = text.split("\n---\n", 1)[1] if "\n---\n" in text else ""
    headings = [line for line in text.splitlines() if re.match(r"#+ ", line)]
    assert len(headings) == 3, headings  # the name, the quality and the use
    assert not re.search(r"(?<!\\)<script", body) and not re.search(r"(?<!\\)\]\(https://evil", body)
    assert card_verdict(text) == "PASS" and text.count("<!-- edkm-export verification") == 2


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({"base_model": {"reference": "some-one/model"}}, ["some-one/model"]),
        ({"base_model": {"reference": "/home/some-one/model"}}, []),
        ({"base_model": {"reference": "../some-one/model"}}, []),
        ({"base_model": {"reference": "C:\\models\\one"}}, []),
        ({"base_model": {"reference": "model"}}, []),
        ({"base_model": "some-one/model"}, []),
        ({"source": {"base_models": {"ids": ["a/b", "c/d"]}}}, ["a/b", "c/d"]),
        ({"source": {"base_models": {"ids": ["a/b", "/abs/olute", 3, "x y/z"]}}}, ["a/b"]),
        ({"source": {"base_models": {"ids": "a/b"}}}, []),
        ({"source": {"base_models": ["a/b"]}}, []),
        ({"source": "a/b"}, []),
        ({}, []),
    ],
)
def test_base_models_are_names_of_a_hub(provenance, expected):
    assert base_models(made(**provenance)) == expected
    read = front(card(made(**provenance)))
    several = expected if len(expected) > 1 else (expected or [None])[0]
    assert read.get("base_model") == several


@pytest.mark.parametrize(
    ("provenance", "told"),
    [
        ({"source": {}}, "in one shot, without a calibration text"),
        (
            {"source": {}, "calibration": {"tokens": 1024}},
            "weighted by the activations of 1,024 tokens of a text",
        ),
        (
            {"source": {}, "calibration": {"tokens": 4096}, "compensation": {"weights": 210}},
            "in one shot, 210 weights with their errors made up for on 4,096 tokens of a text",
        ),
        (
            {"training": {"trained_steps": 300, "trained_tokens": 1228800}},
            "fine-tuned for 300 steps of 1,228,800 tokens in all",
        ),
        ({"training": {"trained_steps": "| many |"}}, "fine-tuned for unknown steps of unknown tokens"),
        ({}, "| palettized | not recorded |"),
    ],
)
def test_how_it_was_made(provenance, told):
    assert told in card(made(**provenance))


def test_no_folder_of_the_maker_is_told():
    home = "/home/some-one"
    text = card(
        made(
            base_model={"reference": f"{home}/model"},
            command=["edkm-export", "palettize", f"{home}/model"],
            calibration={"text": f"{home}/text", "tokens": 3},
            source={"kind": home, "license": {"id": "mit", "from": "LICENSE"}},
        )
    )
    assert home not in text


def test_a_folder_that_looks_like_a_name_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-one" / "model").mkdir(parents=True)
    assert base_models(made(base_model={"reference": "some-one/model"})) == []


def test_another_verification():
    text = card(made())
    other = with_verification(text, "NOT VERIFIED", "It failed.\n")
    assert card_verdict(other) == "NOT VERIFIED" and "It failed." in other and "**PASS**" not in other
    assert with_verification(other, "PASS", "Verdict: **PASS**.") == text
    assert with_verification("# mine\n", "PASS", "x").startswith("# mine\n\n## Quality\n\n<!-- edkm-export")
    assert card_verdict("# mine\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nlicense: mit\n",
        "---\n[\n---\n",
        "---\n- a\n---\n",
        "---\nlicense:\n---\n",
    ],
)
def test_cards_without_a_licence(text):
    assert card_license(text) is None


def test_code_cannot_end_its_block():
    assert code("sh", ["a", "```", "# b"]) == "````sh\na\n```\n# b\n````"
