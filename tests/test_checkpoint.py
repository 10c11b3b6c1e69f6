from __future__ import annotations

import dataclasses
import errno
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.checkpoint import FORMAT_VERSION, Checkpoint, load, save
from edkm_export.checkpoint_digest import PARTS, tensor_digest
from edkm_export.errors import CheckpointError, OutputExistsError
from tests.helpers.checkpoint_files import EMBED, HEAD, LAYER, NORM, make_checkpoint
from tests.helpers.palettes import random_palette
from tests.helpers.snapshots import snapshot

# What is written comes back


def test_round_trip(saved):
    expected, found = make_checkpoint(), load(saved)
    assert found.path == saved
    assert found.palettized.keys() == expected.palettized.keys()
    for name, tensor in expected.palettized.items():
        assert found.palettized[name].same_bits(tensor) and found.palettized[name].name == name
    assert found.dense.keys() == expected.dense.keys()
    for name in ("model.bias", "model.scale"):
        assert found.dense[name].dtype == make_checkpoint().dense[name].dtype
    for attribute in ("config", "tied", "tokenizer", "recipe"):
        assert getattr(found, attribute) == getattr(expected, attribute)
    assert expected.provenance.items() <= found.provenance.items()


def int4_checkpoint() -> Checkpoint:
    """One weight on an int4 grid, one on an int8 grid whose entries would fit in int4 as well."""
    small = random_palette((8, 6), 3, (4, 1), int8=True, name="small")
    lut = small.lut.remainder(16) - 8
    marked = dataclasses.replace(small, lut=lut.to(torch.int8), lut_dtype="int4", name="marked")
    return Checkpoint(
        config={},
        palettized={"marked": marked, "same": dataclasses.replace(marked, lut_dtype="int8")},
        dense={},
    )


def test_an_int4_grid_leaves_a_mark(tmp_path):
    save(int4_checkpoint(), tmp_path / "model.pt")
    found = load(tmp_path / "model.pt").palettized
    assert {name: tensor.lut_dtype for name, tensor in found.items()} == {"marked": "int4", "same": "int8"}
    assert found["marked"].same_bits(found["same"])  # what an export stores


def test_version_1_reads_int4_as_int8(tmp_path, saved):
    """A file as the release before wrote it, digests included."""
    for path, made in ((saved, make_checkpoint()), (tmp_path / "int4.pt", int4_checkpoint())):
        save(made, path, overwrite=True)
        contents = torch.load(path, weights_only=True)
        contents["format_version"] = 1
        for parts in contents["palettized"].values():
            del parts["lut_dtype"]
        contents["provenance"]["sha256"]["palettized"] = tensor_digest(contents["palettized"])
        torch.save(contents, path)
        found = load(path).palettized
        for name, tensor in made.palettized.items():
            assert found[name].same_bits(tensor)
            assert found[name].lut_dtype == ("float16" if tensor.lut_scale is None else "int8")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_versions_are_read_and_say_what_they_do_not_promise(saved, version):
    """As releases before wrote them: without a digest of what is no tensor."""
    contents = torch.load(saved, weights_only=True)
    contents["format_version"] = version
    if version < 3:
        recorded = contents["provenance"]["sha256"]
        contents["provenance"]["sha256"] = {
            part: recorded[part] for part in ("palettized", "dense", "tokenizer")
        }
    if version < 2:
        for parts in contents["palettized"].values():
            del parts["lut_dtype"]
        contents["provenance"]["sha256"]["palettized"] = tensor_digest(contents["palettized"])
    torch.save(contents, saved)
    found = load(saved)
    assert found.format_version == version and found.config == make_checkpoint().config
    assert bool(found.weakness) == (version < 3)
    if version < 3:
        assert f"format version {version}, whose sha256 covers weights and tokenizer alone" in found.weakness


def test_names_that_are_no_text(tmp_path):
    """Linux has files with any bytes in their names; torch opens those with UTF-8 alone."""
    path = tmp_path / "model\udcff.pt"
    for call in (lambda: save(make_checkpoint(), path), lambda: load(path)):
        with pytest.raises(CheckpointError, match=r"model\\udcff.pt: its name is not UTF-8 text"):
            call()
    made = dataclasses.replace(make_checkpoint(), dense={"a\ud800": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"a\\ud800: the name is not UTF-8 text; rename it"):
        save(made, tmp_path / "model.pt")
    assert snapshot(tmp_path) == {}
    made = dataclasses.replace(make_checkpoint(), provenance={"command": ["a\udcff", {"\udc80": 1}]})
    save(made, tmp_path / "model.pt")  # a word of the command line is no name
    assert load(tmp_path / "model.pt").provenance["command"] == ["a\\udcff", {"\\udc80": 1}]


def test_paths_may_be_text(tmp_path):
    path = str(tmp_path / "model.pt")
    save(make_checkpoint(), path)
    assert load(path).path == Path(path)


def test_dense_parameters_come_back_bit_for_bit(tmp_path):
    dense = {
        "half": torch.tensor([0.0, -0.0, 6e-8, 65504.0]).half(),
        "bfloat16": torch.tensor([1e38, -1e-38]).bfloat16(),
        "float32": torch.tensor([1.1, 1e-42]),
        "view": torch.arange(6.0).view(2, 3).t(),
    }
    save(Checkpoint(config={}, palettized={}, dense=dense), tmp_path / "model.pt")
    found = load(tmp_path / "model.pt").dense
    for name, tensor in dense.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_file_is_plain_data(saved):
    contents = torch.load(saved, weights_only=True)
    assert contents["format"] == "edkm-export" and contents["format_version"] == 3 == FORMAT_VERSION
    assert contents["palettized"][EMBED].keys() == {"shape", "n_bits", "lut", "indices", "lut_dtype"}
    assert contents["palettized"][LAYER].keys() == {
        "shape",
        "n_bits",
        "lut",
        "indices",
        "lut_dtype",
        "lut_scale",
    }
    assert contents["provenance"]["sha256"].keys() == set(PARTS)


def test_strings_of_other_libraries_become_plain(tmp_path):
    class Name(str):
        """As numpy and torch have them; unpickling one would need its class."""

    unusual = Checkpoint(
        config={"version": Name("2.13"), Name("key"): (1, 2)},
        palettized={},
        dense={},
        provenance={"x": Name("y")},
    )
    save(unusual, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt").config == {"version": "2.13", "key": [1, 2]}


def test_state_dict_decodes_and_ties(saved):
    found, expected = load(saved), make_checkpoint()
    state = found.state_dict(torch.float32)
    assert state.keys() == {EMBED, LAYER, NORM, HEAD, "model.bias", "model.scale"}
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state[EMBED], expected.palettized[EMBED].decode().float())
    assert state[HEAD] is state[EMBED]


def test_sizes_count_tied_parameters_once():
    made = make_checkpoint()
    palettized = sum(tensor.size_bytes for tensor in made.palettized.values())
    assert made.numel == 60 + 48 + 6 + 8 + 6
    assert made.size_bytes == palettized + 2 * (6 + 8 + 6)  # others are float16 where they are deployed
    assert made.bits_per_weight == made.size_bytes * 8 / made.numel


# Writing


def test_overwriting_must_be_asked_for(saved):
    before = saved.read_bytes()
    with pytest.raises(
        OutputExistsError, match="already exists; choose another -o, or replace it with --overwrite"
    ):
        save(make_checkpoint(), saved)
    assert saved.read_bytes() == before
    other = Checkpoint(config={"new": True}, palettized={}, dense={})
    save(other, saved, overwrite=True)
    assert load(saved).config == {"new": True}


def failing_save(failure: BaseException) -> Callable[[Any, Any], None]:
    def write(_contents: Any, file: Any) -> None:
        Path(file).write_bytes(b"half a file")
        raise failure

    return write


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
    ids=["no space", "torch's own", "Ctrl-C", "memory"],
)
def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, failure, raised, existing):
    path = tmp_path / "model.pt"
    if existing:
        save(make_checkpoint(), path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(torch, "save", failing_save(failure))
    with pytest.raises(raised) as caught:
        save(make_checkpoint(), path, overwrite=existing)
    assert snapshot(tmp_path) == before
    if isinstance(failure, RuntimeError):
        assert str(caught.value).startswith(f"{path}: writing failed, is the disk full?")


def test_configuration_that_is_not_plain_is_a_programming_error(tmp_path):
    with pytest.raises(TypeError):
        save(Checkpoint(config={"tensor": torch.ones(1)}, palettized={}, dense={}), tmp_path / "model.pt")
    assert snapshot(tmp_path) == {}


def test_digest_depends_on_names_dtypes_shapes_and_bytes():
    base = {"a": torch.zeros(2, 3).half()}
    others = [
        {"b": base["a"]},
        {"a": base["a"].bfloat16()},
        {"a": base["a"].view(3, 2)},
        {"a": -base["a"]},  # -0.0
        {"a": base["a"], "b": torch.empty(0)},
        {},
    ]
    digests = {tensor_digest(group) for group in [base, *others]}
    assert len(digests) == len(others) + 1
    reordered = {"y": torch.ones(1), "x": torch.zeros(1)}
    assert tensor_digest(reordered) == tensor_digest(dict(sorted(reordered.items())))


def test_provenance_and_recipe_are_json(saved):
    found = load(saved)
    assert json.loads(json.dumps([found.provenance, found.recipe])) == [found.provenance, found.recipe]


def test_tensors_are_mapped_and_code_is_never_loaded(saved, monkeypatch):
    """Reading a 7B checkpoint must not need its size in memory, nor trust its maker."""
    real, seen = torch.load, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    load(saved)
    assert len(seen) == 1 and seen[0]["mmap"] is True and seen[0]["weights_only"] is True


def test_archive_stores_the_bits_of_numpy(saved):
    """Other tools can read the archive: LUTs are little-endian float16."""
    expected = make_checkpoint().palettized[EMBED].lut.flatten().tolist()
    with zipfile.ZipFile(saved) as archive:
        records = [archive.read(name) for name in archive.namelist() if "/data/" in name]
    assert struct.pack(f"<{len(expected)}e", *expected) in records
