"""YAML within bounds: what is refused in a moment would take minutes or gigabytes."""

from __future__ import annotations

import datetime

import pytest
import yaml

from edkm_export.errors import InputError, RecipeError
from edkm_export.recipe import load_recipe
from edkm_export.training.train_config import load_config_file
from edkm_export.yaml_text import YamlError, load_yaml

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
REFUSED = {
    "a billion laughs": (LAUGHS, "its aliases stand for more than"),
    "a billion merges": (MERGES, "its aliases stand for more than"),
    "an alias in itself": ("a: &a [*a]", "an alias that holds itself"),
    "deep": ("[" * 3000 + "]" * 3000, "nested more than 32 deep"),
    "deep and open": ("{" * 3000, ""),
    "deep blocks": ("- " * 5000, ""),
    "a long number": ("a: " + "9" * 5000, "a number of 5,000 characters"),
    "a long hexadecimal number": ("a: 0x" + "f" * 500_000, "a number of 500,002 characters"),
    "a long number in base 60": ("a: 1:" + "59:" * 4000 + "1", "a number of"),
    "a date that is none": ("a: 2001-99-99", "month must be in 1..12"),
    "a date of a tag": ("a: !!timestamp x", "line 1: 'x' is no timestamp"),
    "a number of a tag": ("a: 1\nb: !!int x", "line 2: 'x' is no int"),
    "a switch of a tag": ("a: !!bool x", "line 1: 'x' is no bool"),
    "long": ("a: " + "x" * (1 << 20), "are not read"),
    "a program": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a key that is a list": ("? [a]\n: b", ""),
    "a merge of numbers": ("<<: [1, 2]", ""),
    "an unknown alias": ("a: *b", "undefined alias"),
    "binary that is none": ("a: !!binary é", ""),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    text, message = REFUSED[kind]
    with pytest.raises(YamlError) as caught:
        load_yaml(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_recipes_and_settings_say_so(kind: str, tmp_path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(REFUSED[kind][0], encoding="utf-8")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_recipe(path)
    with pytest.raises(InputError, match="is not valid YAML"):
        load_config_file(path)


def test_plain_data_is_what_pyyaml_reads() -> None:
    text = (
        "name: mine\nrules:\n  - &a {match: '*.mlp', bits: 4, group_size: 0x10, rate: 1e-3}\n  - *a\n"
        "more: {<<: *a, skip: yes}\nday: 2026-01-31\nnothing: ~\nnumber: -12\nshare: .5\n"
    )
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml(text)["day"] == datetime.date(2026, 1, 31)
    assert load_yaml("") is None
