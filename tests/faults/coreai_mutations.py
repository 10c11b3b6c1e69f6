"""Changes of a Core AI model on disk. Hashes and digests are mended, so that only what they stand for can tell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from converters.coreai.format import dense_digest, palette_digest
from converters.coreai.read.asset import load_asset
from converters.coreai.read.weights import StoredPalette
from edkm_export.checkpoint import Checkpoint
from tests.faults.mutation import Mutation

__all__ = ["COREAI_MUTATIONS"]

# Parameters of the model of fixtures/coreai.
Q, K = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
NORM, FINAL_NORM = "model.layers.1.input_layernorm.weight", "model.norm.weight"


def _rewrite(asset: Path, change: Callable[[bytes], bytes]) -> None:
    path = asset / "main.mlirb"
    before = path.read_bytes()
    after = change(before)
    assert after != before and len(after) == len(before)
    path.write_bytes(after)
    (asset / "main.hash").write_bytes(hashlib.sha256(after).digest())


def _metadata(asset: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = asset / "metadata.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def _told(metadata: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = metadata["creatorDefinedMetadata"]["edkm_export"]
    return found


def _once(raw: bytes, old: bytes, new: bytes) -> bytes:
    assert raw.count(old) == 1 and len(old) == len(new), (raw.count(old), old[:40])
    return raw.replace(old, new)


def _stored(asset: Path, name: str) -> StoredPalette:
    found = load_asset(asset)
    digest = found.description.palettized[name].digest
    return next(palette for palette in found.palettes() if palette.digest == digest)


def _change_palette(name: str, *, lut: bool) -> Callable[[Path, Checkpoint], None]:
    """Another LUT entry, or another index; the digest in the metadata is that of the changed palette."""

    def apply(asset: Path, checkpoint: Checkpoint) -> None:
        before = _stored(asset, name)
        entries, indices = before.lut.copy(), bytearray(before.indices)
        if lut:
            entries.reshape(-1)[0] += 1
            _rewrite(asset, lambda raw: _once(raw, before.lut.tobytes(), entries.tobytes()))
        else:
            indices[0] ^= 1
            _rewrite(asset, lambda raw: _once(raw, before.indices, bytes(indices)))
        digest = palette_digest(before.n_bits, before.index_shape, bytes(indices), entries, before.scale)
        _metadata(asset, lambda metadata: _told(metadata)["palettized"][name].update(digest=digest))

    return apply


def _change_dense(name: str) -> Callable[[Path, Checkpoint], None]:
    def apply(asset: Path, checkpoint: Checkpoint) -> None:
        before = checkpoint.dense[name].half().numpy()
        after = before.copy()
        after.reshape(-1)[0] += 1
        _rewrite(asset, lambda raw: _once(raw, before.tobytes(), after.tobytes()))
        digest = dense_digest(after.tobytes())
        _metadata(asset, lambda metadata: _told(metadata)["dense"][name].update(digest=digest))

    return apply


def _text(old: str, new: str) -> Callable[[Path, Checkpoint], None]:
    """Another string of the same length, such as the name of an operation."""
    return lambda asset, checkpoint: _rewrite(
        asset, lambda raw: _once(raw, b"\0" + old.encode() + b"\0", b"\0" + new.encode() + b"\0")
    )


def _swapped_text(one: str, other: str) -> Callable[[Path, Checkpoint], None]:
    def change(raw: bytes) -> bytes:
        first, second = (b"\0" + word.encode() + b"\0" for word in (one, other))
        assert raw.count(first) == raw.count(second) == 1 and len(first) == len(second)
        return (
            raw.replace(first, b"\0?" * (len(first) // 2))
            .replace(second, first)
            .replace(b"\0?" * (len(first) // 2), second)
        )

    return lambda asset, checkpoint: _rewrite(asset, change)


def _rope(asset: Path, checkpoint: Checkpoint) -> None:
    """The sine of position 1 gets another sign."""
    found = load_asset(asset)
    tables = [
        constant.array()
        for constant in found.program.public["main"].constants()
        if constant.type.element == "float16" and constant.type.shape == (64, 8)
    ]
    sines = next(table for table in tables if not table[0].any())
    after = sines.copy()
    after[1:] = -after[1:]
    _rewrite(asset, lambda raw: _once(raw, sines.tobytes(), after.tobytes()))


def _epsilon(asset: Path, checkpoint: Checkpoint) -> None:
    """The root of the norms' epsilon becomes one."""
    root = np.array(checkpoint.config["rms_norm_eps"] ** 0.5, np.float16).tobytes()
    found = [
        constant.contents
        for constant in load_asset(asset).program.public["main"].constants()
        if bytes(constant.contents.raw) == root
    ]
    assert found
    # kind 6, a splat of two bytes
    _rewrite(asset, lambda raw: _once(raw, b"\x0d\x01\x05" + root, b"\x0d\x01\x05" + np.float16(1).tobytes()))


def _exchange_names(one: str, other: str) -> Callable[[Path, Checkpoint], None]:
    def change(metadata: dict[str, Any]) -> None:
        told = _told(metadata)["dense"]
        told[one]["digest"], told[other]["digest"] = told[other]["digest"], told[one]["digest"]

    return lambda asset, checkpoint: _metadata(asset, change)


def _set(key: str, value: Any) -> Callable[[Path, Checkpoint], None]:
    return lambda asset, checkpoint: _metadata(asset, lambda metadata: _told(metadata).update({key: value}))


COREAI_MUTATIONS = [
    Mutation("bytes", "a LUT entry", _change_palette(GATE, lut=True), module="model.layers.0.mlp.gate_proj"),
    Mutation("bytes", "an index", _change_palette(UP, lut=False)),
    Mutation("bytes", "an index of one bit", _change_palette(Q, lut=False)),
    Mutation("bytes", "a norm weight", _change_dense(NORM), module="model.layers.1.input_layernorm"),
    Mutation("bytes", "the sines of the positions", _rope, module="model.rotary_emb"),
    Mutation("attributes", "the epsilon of the norms", _epsilon),
    Mutation(
        "ops",
        "sums become products, and products sums",
        _swapped_text("primitive.add_v1", "primitive.mul_v1"),
    ),
    Mutation("ops", "maxima become minima", _text("primitive.maximum_v1", "primitive.minimum_v1")),
    Mutation("ops", "residuals are multiplied", _swapped_text("broadcasting_add_v1", "broadcasting_mul_v1")),
    Mutation("ops", "an operation that nobody knows", _text("primitive.rsqrt_v1", "primitive.rsqrt_v9")),
    Mutation("names", "two norms in the metadata", _exchange_names(NORM, FINAL_NORM)),
    Mutation("names", "an input", _text("input_ids", "input_idz")),
    Mutation("shapes", "the vocabulary in the metadata", _set("vocab_size", 319)),
    Mutation("states", "the keys under another name", _text("keyCache", "kezCache")),
    Mutation(
        "names",
        "a resource, which only the file knows",
        lambda asset, checkpoint: _rename(asset),
        harmful=False,
    ),
    Mutation(
        "attributes", "who made it", lambda asset, checkpoint: _metadata(asset, _producer), harmful=False
    ),
]


def _rename(asset: Path) -> None:
    def change(raw: bytes) -> bytes:
        place = raw.index(b"\0resource_") + 10
        return raw[:place] + bytes([ord("1") + (raw[place] - ord("0")) % 9]) + raw[place + 1 :]

    _rewrite(asset, change)


def _producer(metadata: dict[str, Any]) -> None:
    metadata["producer"] = "another"
