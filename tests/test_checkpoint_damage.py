"""Checkpoint files that are something else, carry code, or hold what no writer of ours makes: all are refused."""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoint_files import EMBED, HEAD, LAYER, NORM, make_checkpoint, refused, rewritten

# Files that are something else


def test_missing_file(tmp_path):
    path = tmp_path / "model.pt"
    assert f"no such file; make one with `edkm-export palettize MODEL -o {path}`" in refused(path)


def test_folder(tmp_path):
    assert f"is a folder; to palettize it run `edkm-export palettize {tmp_path}" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated(saved, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * kept)])
    assert "is truncated or not an edkm-export checkpoint; make one with" in refused(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"garbage " * 100, b"PK\x03\x04" + b"\0" * 100, b"\x80\x02}q\x00.", os.urandom(4096)],
    ids=["empty", "a byte", "text", "zip header", "pickled dict", "random"],
)
def test_garbage(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    message = refused(tmp_path / "model.pt")
    assert (
        "is truncated or not an edkm-export checkpoint" in message
        or "holds more than plain tensors" in message
    )


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert "not an edkm-export checkpoint" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "contents",
    [[1, 2], {}, {"format": "gguf"}, {"model.weight": torch.ones(2)}, torch.ones(2), "edkm-export"],
)
def test_torch_file_of_something_else(tmp_path, contents):
    torch.save(contents, tmp_path / "model.pt")
    assert "is not an edkm-export checkpoint; make one with" in refused(tmp_path / "model.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_unreadable_file(saved):
    saved.chmod(0)
    assert "no permission to read it" in refused(saved)


# Files that carry code


class Touch:
    """Unpickling an instance creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def hostile_archive(path: Path, payload: Touch) -> None:
    contents = {"format": "edkm-export", "format_version": 2, "config": payload}
    torch.save(contents, path)


def hostile_legacy_archive(path: Path, payload: Touch) -> None:
    torch.save({"format": "edkm-export", "config": payload}, path, _use_new_zipfile_serialization=False)


def hostile_pickle(path: Path, payload: Touch) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=2))


@pytest.mark.parametrize("write", [hostile_archive, hostile_legacy_archive, hostile_pickle])
def test_code_is_refused_and_never_run(tmp_path, write):
    path, proof = tmp_path / "model.pt", tmp_path / "proof"
    write(path, Touch(proof))
    message = refused(path)
    assert not proof.exists()
    if write is hostile_archive:
        assert "refused, since it holds more than plain tensors, and loading it could run code" in message
        torch.load(path, weights_only=False)  # the payload is live: an unguarded reader runs it
        assert proof.exists()


def test_module_is_refused(saved):
    contents = torch.load(saved, weights_only=True)
    contents["dense"][NORM] = torch.nn.Linear(2, 2)
    torch.save(contents, saved)
    assert "could run code" in refused(saved)


# Contents that are wrong, one fault at a time


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(contents: dict[str, Any]) -> None:
        for key in keys[:-1]:
            contents = contents[key]
        contents[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(contents: dict[str, Any]) -> None:
        for key in keys[:-1]:
            contents = contents[key]
        del contents[keys[-1]]

    return change


def spoil(*keys: str, value: float) -> Callable[[dict[str, Any]], None]:
    """Overwrite the last element of a tensor."""

    def change(contents: Any) -> None:
        for key in keys:
            contents = contents[key]
        contents.view(-1)[-1] = value

    return change


def nest(contents: dict[str, Any]) -> None:
    for _ in range(100):
        contents["deeper"] = {}
        contents = contents["deeper"]


PALETTE = ("palettized", EMBED)
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "version 4": (
        put("format_version", value=4),
        "format version is 4, this release reads 1 to 3; write it again",
    ),
    "version 2 of version 3": (
        lambda contents: contents.update(format_version=2, config={**contents["config"], "hidden_size": 8}),
        "the sha256 of its 'config' part is",
    ),
    "no lut_dtype": (drop(*PALETTE, "lut_dtype"), f"{EMBED}: 'lut_dtype' is missing"),
    "lut_dtype of another LUT": (
        put(*PALETTE, "lut_dtype", value="int4"),
        f"{EMBED}: LUT is torch.float16, but an int4 LUT is stored as int8",
    ),
    "lut_dtype unknown": (put(*PALETTE, "lut_dtype", value="int5"), f"{EMBED}: lut_dtype is 'int5'"),
    "lut_dtype of version 1": (
        put("format_version", value=1),
        f"'{EMBED}': a palettized weight is a dict of",
    ),
    "version 0": (put("format_version", value=0), "format version is 0"),
    "version text": (put("format_version", value="1"), "format version is '1'"),
    "no version": (drop("format_version"), "format version is None"),
    **{
        f"no {key}": (drop(key), f"'{key}' is missing or not a dict; write the file again")
        for key in ("config", "palettized", "dense", "tied", "tokenizer", "recipe", "provenance")
    },
    "config is a list": (put("config", value=[]), "'config' is missing or not a dict"),
    # palettized
    "palette is a tensor": (
        put(*PALETTE, value=torch.ones(2)),
        f"'{EMBED}': a palettized weight is a dict of",
    ),
    "palette with more": (put(*PALETTE, "code", value="x"), f"'{EMBED}': a palettized weight is a dict of"),
    "palette without name": (
        lambda contents: contents["palettized"].update({3: contents["palettized"][EMBED]}),
        "3: a palettized weight is a dict of",
    ),
    **{
        f"palette without {key}": (drop(*PALETTE, key), f"{EMBED}: {key} is None")
        for key in ("shape", "n_bits")
    },
    **{
        f"palette without {key}": (drop(*PALETTE, key), f"{EMBED}: '{key}' is missing or not a plain tensor")
        for key in ("lut", "indices")
    },
    "shape is text": (put(*PALETTE, "shape", value="10x6"), f"{EMBED}: shape is '10x6'"),
    "shape of floats": (put(*PALETTE, "shape", value=[10.0, 6.0]), f"{EMBED}: shape is [10.0, 6.0]"),
    "other shape": (
        put(*PALETTE, "shape", value=[10, 3]),
        f"{EMBED}: indices are torch.uint8 [23], expected uint8 [12]",
    ),
    "bits are a float": (put(*PALETTE, "n_bits", value=3.0), f"{EMBED}: n_bits is 3.0"),
    "5 bits": (put(*PALETTE, "n_bits", value=5), f"{EMBED}: n_bits is 5, expected one of"),
    "7 bits": (put(*PALETTE, "n_bits", value=7), f"{EMBED}: n_bits is 7, expected one of"),
    "lut float32": (put(*PALETTE, "lut", value=torch.zeros(2, 3, 8, 1)), f"{EMBED}: LUT is torch.float32"),
    "lut shape": (
        put(*PALETTE, "lut", value=torch.zeros(2, 3, 4, 1).half()),
        f"{EMBED}: LUT has shape [2, 3, 4, 1], expected [groups_out, groups_in, 8, dim] at 3 bits: "
        "with fewer entries an index could point beyond the LUT",
    ),
    "lut nan": (spoil(*PALETTE, "lut", value=math.nan), f"{EMBED}: LUT holds NaN or infinity"),
    "lut infinity": (spoil(*PALETTE, "lut", value=math.inf), f"{EMBED}: LUT holds NaN or infinity"),
    "index dtype": (put(*PALETTE, "indices", value=torch.zeros(23)), f"{EMBED}: indices are torch.float32"),
    "index length": (
        put(*PALETTE, "indices", value=torch.zeros(22, dtype=torch.uint8)),
        f"{EMBED}: indices are torch.uint8 [22], expected uint8 [23] for 10 x 6 indices of 3 bits",
    ),
    "padding": (
        spoil(*PALETTE, "indices", value=255),
        "the 4 padding bits at the end of the index stream are not zero",
    ),
    "scale is a number": (
        put("palettized", LAYER, "lut_scale", value=1.0),
        f"{LAYER}: 'lut_scale' is not a plain tensor",
    ),
    "no scale": (drop("palettized", LAYER, "lut_scale"), f"{LAYER}: an int8 LUT needs a lut_scale"),
    "scale nan": (spoil("palettized", LAYER, "lut_scale", value=math.nan), f"{LAYER}: lut_scale holds NaN"),
    # dense
    "dense is a number": (put("dense", NORM, value=1.0), f"'{NORM}': is not a plain tensor"),
    "dense int64": (
        put("dense", NORM, value=torch.ones(6).long()),
        f"{NORM}: is torch.int64, expected one of float16",
    ),
    "dense float64": (put("dense", NORM, value=torch.ones(6).double()), f"{NORM}: is torch.float64"),
    "dense nan": (spoil("dense", NORM, value=math.nan), f"{NORM}: holds NaN or infinity"),
    "dense infinity": (spoil("dense", "model.bias", value=-math.inf), "model.bias: holds NaN or infinity"),
    "both": (put("dense", EMBED, value=torch.ones(2)), f"{EMBED}: both palettized and dense"),
    # tied
    "tied to nothing": (put("tied", HEAD, value="gone"), f"{HEAD}: tied to 'gone', which is not in the file"),
    "tied to a tied one": (
        put("tied", "again", value=HEAD),
        f"again: tied to '{HEAD}', which is not in the file",
    ),
    "tied to a number": (put("tied", HEAD, value=3), f"{HEAD}: tied to 3, which is not in the file"),
    "tied and stored": (put("tied", LAYER, value=EMBED), f"{LAYER}: tied and stored at once"),
    # tokenizer
    **{
        f"tokenizer file {name!r}": (
            put("tokenizer", name, value=torch.zeros(1, dtype=torch.uint8)),
            f"tokenizer file {name!r} is not a plain file name; refused",
        )
        for name in ("../x", "/etc/passwd", "a/b", "..", ".", "", "a/")
    },
    "tokenizer bytes": (
        put("tokenizer", "tokenizer.json", value=b"{}"),
        "tokenizer.json: expected its bytes as a uint8",
    ),
    "tokenizer dtype": (
        put("tokenizer", "tokenizer.json", value=torch.zeros(2)),
        "expected its bytes as a uint8 tensor",
    ),
    # sha256
    "no sha256": (drop("provenance", "sha256"), "provenance holds no sha256 of its parts"),
    "another lut": (spoil(*PALETTE, "lut", value=1.0), "the sha256 of its 'palettized' part is"),
    "another scale": (
        spoil("palettized", LAYER, "lut_scale", value=1.0),
        "the sha256 of its 'palettized' part is",
    ),
    "another shape": (put(*PALETTE, "shape", value=[10, 3, 2]), "the sha256 of its 'palettized' part is"),
    "a weight less": (drop("palettized", LAYER), "the sha256 of its 'palettized' part is"),
    "another norm": (spoil("dense", NORM, value=1.0), "the sha256 of its 'dense' part is"),
    "a norm less": (drop("dense", NORM), "the sha256 of its 'dense' part is"),
    "another dtype": (put("dense", "model.bias", value=torch.ones(8)), "the sha256 of its 'dense' part is"),
    "another tokenizer": (
        spoil("tokenizer", "tokenizer.json", value=0),
        "the sha256 of its 'tokenizer' part is",
    ),
    "another configuration": (put("config", "hidden_size", value=8), "the sha256 of its 'config' part is"),
    "a setting more": (put("config", "return_dict", value=False), "the sha256 of its 'config' part is"),
    "another recipe": (put("recipe", "name", value="best"), "the sha256 of its 'recipe' part is"),
    "another seed": (put("provenance", "seed", value=4), "the sha256 of its 'provenance' part is"),
    "another tie": (put("tied", HEAD, value=NORM), "the sha256 of its 'tied' part is"),
    "no digest of a part": (drop("provenance", "sha256", "recipe"), "but None... was recorded"),
    # what JSON does not hold
    "config of a tensor": (
        put("config", "hidden_size", value=torch.ones(1)),
        "config.hidden_size is Tensor, which is no plain data",
    ),
    "config of a number": (put("config", 5, value=1), "config has the key 5, which is no text"),
    "recipe of a set": (
        put("recipe", "rules", value=[{"a": {1}}]),
        "recipe.rules[0].a is set, which is no plain",
    ),
    "provenance without end": (lambda contents: nest(contents["provenance"]), "is nested too deeply"),
    # names that are no text
    **{
        f"surrogate in {key}": (
            lambda contents, key=key: contents[key].update({"a\ud800": next(iter(contents[key].values()))}),
            "'a\\ud800': the name is not UTF-8 text",
        )
        for key in ("palettized", "dense", "tied", "tokenizer")
    },
    "surrogate in config": (put("config", "a", value="\ud800"), "config.a is no UTF-8 text"),
    # what no check foresaw
    "shape of 2**70": (put(*PALETTE, "shape", value=[2**70, 2**70]), f"{EMBED}: "),
    "negative shape": (put(*PALETTE, "shape", value=[-10, -6]), f"{EMBED}: "),
    "empty shape": (put(*PALETTE, "shape", value=[]), f"{EMBED}: "),
    "lut without dimensions": (put(*PALETTE, "lut", value=torch.tensor(1.0).half()), f"{EMBED}: "),
    "lut_dtype is a list": (put(*PALETTE, "lut_dtype", value=["float16"]), f"{EMBED}: "),
    "another file name": (
        lambda contents: contents["tokenizer"].update({"other": contents["tokenizer"].pop("empty.txt")}),
        "the sha256 of its 'tokenizer' part is",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_contents_are_refused(saved, fault):
    change, message = FAULTS[fault]
    assert message in refused(rewritten(saved, change))


# Python values and tensors that pickle allows, but no writer of ours makes. Each must be refused like any other
# damage: an exception of torch or Python would reach the user as a traceback.
UNUSUAL: dict[str, Callable[[dict[str, Any]], None]] = {
    "sparse dense": put("dense", NORM, value=torch.ones(6).half().to_sparse()),
    "sparse rows": put("dense", NORM, value=torch.ones(6, 6).half().to_sparse_csr()),
    "meta dense": put("dense", NORM, value=torch.empty(6, dtype=torch.float16, device="meta")),
    "2 PB dense of one element": put("dense", NORM, value=torch.ones(1).half().expand(10**15)),
    "sparse lut": put(*PALETTE, "lut", value=torch.ones(2, 3, 8, 1).half().to_sparse()),
    "meta lut": put(*PALETTE, "lut", value=torch.empty(2, 3, 8, 1, dtype=torch.float16, device="meta")),
    "meta indices": put(*PALETTE, "indices", value=torch.empty(23, dtype=torch.uint8, device="meta")),
    "meta tokenizer": put(
        "tokenizer", "tokenizer.json", value=torch.empty(2, dtype=torch.uint8, device="meta")
    ),
    "tied to a list": put("tied", HEAD, value=[EMBED]),
    "version is a tensor": put("format_version", value=torch.tensor([1, 1])),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("fault", UNUSUAL)
def test_unusual_contents_are_refused(saved, fault):
    refused(rewritten(saved, UNUSUAL[fault]))


def test_flipped_byte_is_found(saved):
    """A bit of a weight's data changes without touching the structure of the file."""
    needle = make_checkpoint().palettized[EMBED].indices.numpy().tobytes()
    content = bytearray(saved.read_bytes())
    assert content.count(needle) == 1
    content[content.index(needle)] ^= 1
    saved.write_bytes(content)
    message = refused(saved)
    assert re.search(
        r"the sha256 of its 'palettized' part is \w{16}\.\.\., but \w{16}\.\.\. was recorded when it was written: "
        "the file was damaged or changed; write it again",
        message,
    )


def test_shorter_storage_than_the_tensor_needs_is_refused(saved, tmp_path):
    """A record of the archive is cut, the archive itself being well-formed."""
    cut = tmp_path / "cut.pt"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(cut, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            is_indices = content == make_checkpoint().palettized[EMBED].indices.numpy().tobytes()
            target.writestr(info.filename, content[:3] if is_indices else content)
    refused(cut)
