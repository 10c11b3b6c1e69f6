"""As transformers itself writes and reads them."""

from __future__ import annotations

import json
import math

import transformers

from edkm_export.special_floats import decode_object, encode

VALUES = {
    "a": [1.5, math.inf, {"b": -math.inf}],
    "c": "Infinity",
    "d": {"__float__": 3},
    "e": (2.0, math.inf),
}


def test_as_transformers_writes_them(tmp_path):
    transformers.PretrainedConfig(a=VALUES["a"], e=VALUES["e"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for key in ("a", "e"):
        assert encode(VALUES[key]) == written[key]


def test_there_and_back():
    text = json.dumps(encode(VALUES), allow_nan=False)
    assert json.loads(text, object_hook=decode_object) == {**VALUES, "e": [2.0, math.inf]}
    assert math.isnan(json.loads(json.dumps(encode(math.nan), allow_nan=False), object_hook=decode_object))
