"""The controls: what is intact passes, and every kind of damage to the files on disk is found."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.coreml.format import PARAMETERS_KEY
from edkm_export.checkpoint import Checkpoint
from edkm_export.verify.report import Report, Verdict
from tests.helpers.sampling import sampled

pytest.importorskip("coremltools")

TOKENS = 128
WEIGHT, OTHER = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def verdicts(report: Report) -> dict[str, Verdict]:
    return {rung.id: rung.verdict for rung in report.rungs}


@pytest.fixture
def verify(edkm, held_out, tmp_path) -> Callable[[Path, Path], tuple[int, Report]]:
    """Exit status and report of `edkm-export verify`."""
    (tmp_path / "text").write_text(held_out, encoding="utf-8")

    def run(model: Path, package: Path) -> tuple[int, Report]:
        folder = tmp_path / "report"
        result = edkm(
            "verify", model, package, "--text", tmp_path / "text", "--tokens", TOKENS, "--report", folder
        )
        assert result.status in (0, 1), result.err
        report = Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
        assert report.faithful_export.value in result.out
        assert (
            report.faithful_export.value in (folder / "report.md").read_text(encoding="utf-8").splitlines()[2]
        )
        return result.status, report

    return run


# What is intact


def test_palettized_export_passes(verify, tiny_export):
    status, report = verify(tiny_export.model, tiny_export.bundle)
    assert status == 0 and report.faithful_export is Verdict.PASS
    assert verdicts(report) == {
        "source": Verdict.PASS,
        "soft": Verdict.NOT_RUN,
        "palettization": Verdict.WITHIN,
        "bytes": Verdict.PASS,
        "size": Verdict.PASS,
        "context": Verdict.PASS,
        "execution-float32": Verdict.PASS,
        "execution-rounded": Verdict.PASS,
        "execution-apple": Verdict.NOT_RUN,
        "prefill-decode": Verdict.NOT_RUN,
        "continuation": Verdict.PASS,
    }
    assert report.bit_exact_tensors == len(report.tensors) == len(tiny_export.checkpoint.palettized) == 29
    assert all(tensor.weight_snr_db is not None for tensor in report.tensors)


def test_unpalettized_export_passes(verify, dense_export):
    """The same path with nothing palettized: what the ladder measures is not made by the ladder."""
    status, report = verify(dense_export.model, dense_export.bundle)
    assert status == 0 and report.faithful_export is Verdict.PASS and report.tensors == []
    assert {key for key, verdict in verdicts(report).items() if not verdict.is_good} == {
        "soft",
        "execution-apple",
        "prefill-decode",
    }
    # hard PyTorch holds the original's own float16 weights: the very same sums
    measures = next(rung.measures for rung in report.rungs if rung.id == "palettization")
    assert measures["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    assert measures["top1_agreement"] == 1


# What is damaged


def weight_file(package: Path) -> Path:
    (found,) = package.rglob("weight.bin")
    return found


def stored(tiny: Checkpoint, name: str, part: str) -> bytes:
    """The bytes of a parameter as they must lie in weight.bin."""
    if part == "dense":
        return tiny.dense[name].half().numpy().tobytes()
    return getattr(tiny.palettized[name], part).numpy().tobytes()


def flip(name: str, part: str, byte: int, mask: int) -> Callable[[Path, Checkpoint], None]:
    """Flip bits of one byte of a parameter's data."""

    def damage(package: Path, tiny: Checkpoint) -> None:
        path = weight_file(package)
        data, needle = bytearray(path.read_bytes()), stored(tiny, name, part)
        assert data.count(needle) == 1
        data[data.index(needle) + byte] ^= mask
        path.write_bytes(data)

    return damage


def resize(size: Callable[[int], int]) -> Callable[[Path, Checkpoint], None]:
    def damage(package: Path, _tiny: Checkpoint) -> None:
        content = weight_file(package).read_bytes()
        weight_file(package).write_bytes(content[: size(len(content))])

    return damage


RECORD = struct.Struct("<IIQQQ")  # sentinel, dtype, size in bytes, data offset, padding bits


def rewrite_record(
    name: str, part: str, field: int, change: Callable[[int], int]
) -> Callable[[Path, Checkpoint], None]:
    """Change a field of the record in front of a parameter's data."""

    def damage(package: Path, tiny: Checkpoint) -> None:
        path = weight_file(package)
        data = bytearray(path.read_bytes())
        offset = data.index(stored(tiny, name, part)) - 64
        fields = list(RECORD.unpack_from(data, offset))
        assert fields[0] == 0xDEADBEEF and fields[3] == offset + 64
        fields[field] = change(fields[field])
        RECORD.pack_into(data, offset, *fields)
        path.write_bytes(data)

    return damage


def edit_program(change: Callable[[Any], object]) -> Callable[[Path, Checkpoint], None]:
    """Change the protobuf message of the model."""

    def damage(package: Path, _tiny: Checkpoint) -> None:
        from coremltools.proto import Model_pb2

        (path,) = package.rglob("*.mlmodel")
        message = Model_pb2.Model()
        message.ParseFromString(path.read_bytes())
        change(message)
        path.write_bytes(message.SerializeToString())

    return damage


def rename(change: Callable[[dict[str, str]], object]) -> Callable[[Path, Checkpoint], None]:
    """Change the names of the parameters in the metadata."""

    def edit(message: Any) -> None:
        metadata = message.description.metadata.userDefined
        names = json.loads(metadata[PARAMETERS_KEY])
        change(names)
        metadata[PARAMETERS_KEY] = json.dumps(names)

    return edit_program(edit)


def swap(names: dict[str, str]) -> None:
    first, second = (next(key for key, name in names.items() if name == wanted) for wanted in (WEIGHT, OTHER))
    names[first], names[second] = names[second], names[first]


def forget(message: Any) -> None:
    del message.description.metadata.userDefined[PARAMETERS_KEY]


def metadata(value: str) -> Callable[[Any], None]:
    def edit(message: Any) -> None:
        message.description.metadata.userDefined[PARAMETERS_KEY] = value

    return edit


def overwrite(pattern: str, content: bytes) -> Callable[[Path, Checkpoint], None]:
    def damage(package: Path, _tiny: Checkpoint) -> None:
        (path,) = package.rglob(pattern)
        path.write_bytes(content)

    return damage


# Damage, and the rungs that must fail because of it.
DAMAGE: dict[str, tuple[Callable[[Path, Checkpoint], None], set[str]]] = {
    "sign of a LUT entry": (flip(WEIGHT, "lut", 1, 0x80), {"bytes"}),
    # 65,536 times larger or smaller
    "exponent of a LUT entry": (
        flip(WEIGHT, "lut", 1, 0x40),
        {"bytes", "execution-float32", "execution-rounded"},
    ),
    "last bit of a LUT entry": (flip(WEIGHT, "lut", 0, 1), {"bytes"}),
    "LUT entry is infinite": (flip(EMBEDDING, "lut", 1, 0x7C), {"bytes"}),
    "one index": (flip(WEIGHT, "indices", 100, 1), {"bytes"}),
    "one index of the embedding": (flip(EMBEDDING, "indices", 5000, 0x80), {"bytes"}),
    "a norm": (flip(NORM, "dense", 1, 0x04), {"bytes", "execution-float32", "execution-rounded"}),
    "file loses a byte": (resize(lambda size: size - 1), {"bytes"}),
    "file loses its half": (resize(lambda size: size // 2), {"bytes"}),
    "file loses all but the header": (resize(lambda _size: 64), {"bytes"}),
    "file is empty": (resize(lambda _size: 0), {"bytes"}),
    "file is missing": (lambda package, _tiny: weight_file(package).unlink(), {"bytes"}),
    "blob is larger": (rewrite_record(WEIGHT, "indices", 2, lambda size: size + 64), {"bytes"}),
    "blob is smaller": (rewrite_record(WEIGHT, "indices", 2, lambda size: size - 64), {"bytes"}),
    "blob is enormous": (rewrite_record(WEIGHT, "lut", 2, lambda _size: 2**62), {"bytes"}),
    "offset is odd": (rewrite_record(WEIGHT, "lut", 3, lambda offset: offset + 1), {"bytes"}),
    "offset of another blob": (rewrite_record(WEIGHT, "indices", 3, lambda offset: offset + 64), {"bytes"}),
    "offset is beyond the file": (rewrite_record(WEIGHT, "lut", 3, lambda _offset: 2**40), {"bytes"}),
    "offset wraps around": (rewrite_record(WEIGHT, "lut", 3, lambda _offset: 2**64 - 64), {"bytes"}),
    "another dtype": (rewrite_record(WEIGHT, "lut", 1, lambda code: code + 1), {"bytes"}),
    "padding bits": (rewrite_record(WEIGHT, "indices", 4, lambda bits: bits + 1), {"bytes"}),
    "no record": (rewrite_record(WEIGHT, "lut", 0, lambda _sentinel: 0), {"bytes"}),
    "names are swapped": (rename(swap), {"bytes"}),
    "a name is missing": (rename(lambda names: names.pop("model_layers_0_mlp_up_proj_weight")), {"bytes"}),
    "names are forgotten": (edit_program(forget), {"bytes"}),
    "names are not JSON": (edit_program(metadata("{")), {"bytes"}),
    "names are a list": (edit_program(metadata("[1]")), {"bytes"}),
    "program is empty": (overwrite("*.mlmodel", b""), {"bytes"}),
    "program is garbage": (overwrite("*.mlmodel", b"garbage " * 50), {"bytes"}),
    "manifest is garbage": (overwrite("Manifest.json", b"{"), {"bytes"}),
    "manifest leads outside": (
        overwrite(
            "Manifest.json",
            b'{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../../../../etc/passwd"}}}',
        ),
        {"bytes"},
    ),
}


@pytest.mark.parametrize("kind", sampled(DAMAGE, 5))
def test_damage_is_found(kind, verify, tiny_export, tmp_path):
    damage, expected = DAMAGE[kind]
    package = Path(shutil.copytree(tiny_export.package, tmp_path / "copy" / "model.mlpackage"))
    damage(package, tiny_export.checkpoint)
    status, report = verify(tiny_export.model, package)
    assert status == 1 and report.faithful_export is Verdict.FAIL
    found = verdicts(report)
    assert expected <= {key for key, verdict in found.items() if verdict is Verdict.FAIL}
    assert (
        found["palettization"] is Verdict.WITHIN
    )  # what training lost is not mixed up with what conversion broke
    detail = next(rung.detail for rung in report.rungs if rung.id == "bytes")
    if kind in ("sign of a LUT entry", "last bit of a LUT entry", "one index"):
        assert detail.startswith("28 of 29 palettized tensors bit-exact") and f"{WEIGHT} differs" in detail
        assert [tensor.name for tensor in report.tensors if not tensor.bit_exact] == [WEIGHT]
    if kind == "names are swapped":
        assert f"{WEIGHT} differs" in detail and f"{OTHER} differs" in detail
    if kind == "a norm":
        assert f"{NORM} differs" in detail


def alone(package: Path, folder: Path) -> Path:
    """A copy outside of its folder, which knows the sha256 of its model.pt."""
    return Path(shutil.copytree(package, folder / "alone" / package.name))


def test_package_of_another_model_is_found(verify, tiny_export, dense_export, tmp_path):
    status, report = verify(tiny_export.model, alone(dense_export.package, tmp_path))
    assert status == 1 and verdicts(report)["bytes"] is Verdict.FAIL
    detail = next(rung.detail for rung in report.rungs if rung.id == "bytes")
    assert detail.startswith("0 of 29") and "model.embed_tokens.weight is dense" in detail
    assert verdicts(report)["size"] is Verdict.FAIL


def test_palettes_that_should_not_be_there_are_found(verify, tiny_export, dense_export, tmp_path):
    status, report = verify(dense_export.model, alone(tiny_export.package, tmp_path))
    assert status == 1
    assert "should not be palettized" in next(rung.detail for rung in report.rungs if rung.id == "bytes")
