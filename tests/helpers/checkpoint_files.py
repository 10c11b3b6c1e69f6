"""A small checkpoint, and ways to damage its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.checkpoint import Checkpoint, load
from edkm_export.errors import CheckpointError
from tests.helpers.palettes import random_palette

__all__ = ["EMBED", "HEAD", "LAYER", "NORM", "make_checkpoint", "refused", "rewritten"]

EMBED, LAYER, NORM, HEAD = "model.embed.weight", "model.layer.weight", "model.norm.weight", "lm_head.weight"


def make_checkpoint() -> Checkpoint:
    return Checkpoint(
        config={"model_type": "llama", "hidden_size": 6, "nested": {"list": [1, 2.5, None, True, "ä"]}},
        palettized={
            EMBED: random_palette((10, 6), 3, (2, 3), name=EMBED),
            LAYER: random_palette((8, 6), 4, (4, 1), int8=True, name=LAYER),
        },
        dense={
            NORM: torch.randn(6).half(),
            "model.bias": torch.randn(8).bfloat16(),
            "model.scale": torch.randn(2, 3),
        },
        tied={HEAD: EMBED},
        tokenizer={"tokenizer.json": b'{"a": "\xc3\xa4"}', "empty.txt": b""},
        recipe={"name": "test", "rules": [{"bits": 3}]},
        provenance={"seed": 3, "command": ["edkm-export", "palettize"]},
    )


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The file with its contents changed, its sha256 left as it was."""
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)
    return path


def refused(path: Path) -> str:
    """The message of the refusal: one line that begins with the file and ends with what to do."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message
