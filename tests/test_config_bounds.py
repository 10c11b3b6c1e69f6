"""Numbers of a configuration that its weights do not bear out: refused before anything is built."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edkm_export import checkpoint
from edkm_export.checkpoint import load
from edkm_export.config_bounds import check_config
from edkm_export.errors import CheckpointError, EdkmExportError, InputError

SHAPES = {"model.layers.0.a.weight": (32, 48), "model.layers.1.a.weight": (32, 48), "embed.weight": (320, 32)}
ABSURD = {
    "num_hidden_layers": 10**7,
    "num_labels": 10**8,
    "max_position_embeddings": 10**12,
    "head_dim": 2**40,
    "hidden_size": 2**62,
    "vocab_size": 10**15,
    "num_attention_heads": 2**33,
    "rms_norm_eps": 10**4000,
    "id2label": {str(number): "x" for number in range(70_000)},
    "rope_parameters": {"deep": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]},
}


@pytest.mark.parametrize("key", ABSURD)
@pytest.mark.parametrize("shapes", [None, SHAPES], ids=["without weights", "with weights"])
def test_refused(key: str, shapes) -> None:
    with pytest.raises(InputError, match="^it: "):
        check_config({"model_type": "llama", key: ABSURD[key]}, "it", shapes)


def test_one_layer_more_than_there_are_weights() -> None:
    check_config({"num_hidden_layers": 2}, "it", SHAPES)
    with pytest.raises(InputError, match=r"num_hidden_layers is 3 layers, but its weights are of 2"):
        check_config({"num_hidden_layers": 3}, "it", SHAPES)


@pytest.mark.parametrize(
    "config",
    [
        {
            "max_position_embeddings": 10_485_760,
            "vocab_size": 262_208,
            "hidden_size": 16_384,
            "num_hidden_layers": 126,
        },
        {
            "sliding_window": 4096,
            "attention_chunk_size": 8192,
            "num_labels": 2,
            "id2label": {"0": "a", "1": "b"},
        },
        {
            "initializer_range": 0.02,
            "rope_theta": 1e9,
            "eos_token_id": [128_001, 128_008],
            "torch_dtype": "bfloat16",
        },
    ],
)
def test_real_ones_pass(config) -> None:
    check_config(config, "it")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "head_dim", "max_position_embeddings"])
def test_every_reader_asks(key: str, small_export, small_folder, tmp_path: Path, edkm) -> None:
    """A folder and a model.pt with such a configuration are refused at once, whatever is to be done with them."""
    folder = tmp_path / "folder"
    shutil.copytree(small_folder, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {key: ABSURD[key]}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert edkm("inspect", folder).status == 2
    assert edkm("palettize", folder, "-o", tmp_path / "out.pt").status == 2

    from edkm_export.decoder.build import empty_decoder
    from edkm_export.reference.hard_model import load_hard_model

    if key == "num_labels":  # no model is built from it: see `reference.config_fields.shaping_fields`
        return
    made = load(small_export.model)
    changed = replace(made, config={**made.config, key: ABSURD[key]})
    checkpoint.save(changed, tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        load_hard_model(load(tmp_path / "model.pt"))
    with pytest.raises(EdkmExportError):
        empty_decoder(load(tmp_path / "model.pt"))
