"""model.pt: the checkpoint that training and one-shot palettization write, and every converter reads.

A `torch.save` archive of plain tensors and plain Python, read with `weights_only=True`, so that reading one
never runs code. Keys:

    format          "edkm-export"
    format_version  3; 1 and 2 are read as well
    config          the Hugging Face configuration, a dict
    palettized      {name: {"shape", "n_bits", "lut", "indices", "lut_dtype", "lut_scale" (scaled LUTs only)}}
    dense           {name: float16, bfloat16 or float32 tensor}
    tied            {name: name of the parameter that it shares}
    tokenizer       {file name: its bytes, as a uint8 tensor}
    recipe          the recipe, a dict
    provenance      versions, command, seed, base model, sha256 of each part (see `checkpoint_digest`); no absolute
                    path: the base model is named as seen from the folder of the checkpoint
    embedding       of an embedding model alone: `EmbeddingSettings`, a dict

Versions 1 and 2 have digests of the tensors and the tokenizer alone: damage of the configuration goes unnoticed.
Version 1 had no "lut_dtype". It is then the dtype of the LUT: an int4 grid of version 1 reads as int8.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.atomic import atomic_file
from edkm_export.checkpoint_digest import RECORD, changed, part_digests
from edkm_export.command_line import command_line
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.errors import CheckpointError, EdkmExportError, PaletteError
from edkm_export.limits import is_out_of_memory, words_of
from edkm_export.local_paths import without_folders
from edkm_export.palette import PalettizedTensor, all_finite
from edkm_export.plain_data import as_plain, is_utf8, not_plain, printable
from edkm_export.quantities import bit_range, short_count, short_size
from edkm_export.torch_archive import UnsafeArchiveError, load_archive
from edkm_export.unfinished import unfinished_run

__all__ = ["FORMAT", "FORMAT_VERSION", "Checkpoint", "load", "save"]

FORMAT = "edkm-export"
FORMAT_VERSION = 3
_READABLE_VERSIONS = (1, 2, 3)
_DENSE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEYS = ("config", "palettized", "dense", "tied", "tokenizer", "recipe", "provenance")


@dataclass(frozen=True)
class Checkpoint:
    """A palettized model.

    Attributes:
        config: Hugging Face configuration.
        palettized: weights as lookup tables and indices, by parameter name.
        dense: the other parameters, float16, bfloat16 or float32, by parameter name.
        tied: parameters that share another one's values: {name: name of the one that is stored}.
        tokenizer: tokenizer files, {file name: content}.
        recipe: the recipe that made it.
        provenance: versions, command, seed, base model.
        path: where it was read from, None for one that was just made.
        embedding: pooling and what follows, of an embedding model; None: it is none.
        format_version: of the file that it was read from.
    """

    config: dict[str, Any]
    palettized: dict[str, PalettizedTensor]
    dense: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    embedding: EmbeddingSettings | None = None
    format_version: int = FORMAT_VERSION

    def __repr__(self) -> str:
        """One line: family, parameters, what is palettized, size."""
        parts = [f"{short_count(self.numel)} parameters"]
        if family := self.config.get("model_type"):
            parts.insert(0, f"{family} embeddings" if self.embedding is not None else str(family))
        if self.palettized:
            bits = bit_range(tensor.n_bits for tensor in self.palettized.values())
            parts.append(f"{len(self.palettized)} palettized at {bits}")
        else:
            parts.append("none palettized")
        return f"Checkpoint({', '.join([*parts, short_size(self.size_bytes)])})"

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it, whole or not at all; see the function `save`.

        Raises:
            OutputExistsError: `path` exists and `overwrite` is false.
            OSError: the disk is full or not writable; no partial file is left.
        """
        save(self, path, overwrite=overwrite)

    @property
    def weakness(self) -> str:
        """What an older format does not promise, a sentence for people; empty: it is not older."""
        if self.format_version >= 3:
            return ""
        return (
            f"{self.path}: has format version {self.format_version}, whose sha256 covers weights and tokenizer alone: "
            "damage of its configuration, recipe or provenance would go unnoticed"
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights: palettized ones as stored, the others as float16."""
        dense = sum(tensor.numel() * 2 for tensor in self.dense.values())
        return dense + sum(tensor.size_bytes for tensor in self.palettized.values())

    @property
    def numel(self) -> int:
        """Parameters, tied ones counted once."""
        dense = sum(tensor.numel() for tensor in self.dense.values())
        return dense + sum(tensor.numel for tensor in self.palettized.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each stored parameter, by name."""
        found = {name: tensor.shape for name, tensor in self.palettized.items()}
        return found | {name: tuple(tensor.shape) for name, tensor in self.dense.items()}

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage a parameter, LUTs and unpalettized parameters included."""
        return self.size_bytes * 8 / self.numel

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Every parameter decoded, `dtype`, tied ones under each of their names (one tensor)."""
        stored = tracked(self.palettized.items(), "decoding", "weights")
        state = {name: tensor.decode().to(dtype) for name, tensor in stored}
        state.update({name: tensor.to(dtype) for name, tensor in self.dense.items()})
        state.update({name: state[target] for name, target in self.tied.items()})
        return state

    def parameter(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One parameter decoded, `dtype`, in memory of its own; see `state_dict`.

        Raises:
            KeyError: there is none of this name.
        """
        stored = self.tied.get(name, name)
        if stored in self.palettized:
            return self.palettized[stored].decode().to(dtype)
        return self.dense[stored].to(dtype, copy=True)

    def check_parameters(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with those of the model that the configuration describes.

        Args:
            expected: {parameter name: shape}, of every parameter of the model.

        Raises:
            CheckpointError: naming the parameter that is missing, unknown or misshapen.
        """
        source, again = str(self.path or "checkpoint"), "palettize the model again"
        actual = self.shapes
        for name, target in self.tied.items():
            if target not in actual:
                raise CheckpointError(
                    f"{source}: parameter {target}, which {name} shares, is missing; {again}."
                )
        actual |= {name: actual[target] for name, target in self.tied.items()}
        for name in expected:
            if name not in actual:
                raise CheckpointError(f"{source}: parameter {name} is missing; {again}.")
        for name, shape in actual.items():
            if name not in expected:
                raise CheckpointError(f"{source}: parameter {name} is not part of the model; {again}.")
            if shape != expected[name]:
                raise CheckpointError(
                    f"{source}: parameter {name} has shape {list(shape)}, the model needs {list(expected[name])}; "
                    f"{again}."
                )


def save(checkpoint: Checkpoint, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        OSError: the disk is full or not writable; no partial file is left.
    """
    path = Path(path)
    _check_names(path, checkpoint)
    tokenizer = {
        name: torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
        for name, content in checkpoint.tokenizer.items()
    }
    contents: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": as_plain(checkpoint.config),
        "palettized": {name: _pack_palettized(tensor) for name, tensor in checkpoint.palettized.items()},
        "dense": {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.dense.items()},
        "tied": dict(checkpoint.tied),
        "tokenizer": tokenizer,
        "recipe": as_plain(checkpoint.recipe),
    }
    if checkpoint.embedding is not None:
        contents["embedding"] = as_plain(checkpoint.embedding.model_dump(mode="json"))
    contents["provenance"] = _provenance(as_plain(checkpoint.provenance))
    contents["provenance"][RECORD] = part_digests(contents)
    with atomic_file(path, overwrite=overwrite, needed_bytes=checkpoint.size_bytes) as temporary:
        try:
            torch.save(contents, temporary)
        except RuntimeError as error:  # torch reports a failed write so, without an errno
            raise OSError(f"{path}: writing failed, is the disk full? ({_first_line(error)})") from error


def _check_names(path: Path, checkpoint: Checkpoint) -> None:
    """Refuse names that the file could not hold, or that nothing could read again."""
    _require(
        is_utf8(str(path)), path, "its name is not UTF-8 text, and torch opens no such file; choose another"
    )
    for name in (*checkpoint.palettized, *checkpoint.dense, *checkpoint.tied, *checkpoint.tokenizer):
        _require(is_utf8(name), path, f"{printable(name)}: the name is not UTF-8 text; rename it")


def _provenance(given: dict[str, Any]) -> dict[str, Any]:
    """Without local paths, but for where the original and its adapter lie: they are looked for there.

    A checkpoint is a working file; what an export leaves names files without their folders.
    """
    found: dict[str, Any] = without_folders(given)
    base, named = given.get("base_model"), found.get("base_model")
    if isinstance(base, dict) and isinstance(named, dict):
        for whole, short in ((base, named), (base.get("adapter"), named.get("adapter"))):
            if isinstance(whole, dict) and isinstance(short, dict) and "reference" in whole:
                short["reference"] = whole["reference"]
    return found


def load(path: str | Path) -> Checkpoint:
    """Read and validate a checkpoint. Tensors are memory mapped.

    Args:
        path: of the file.

    Raises:
        CheckpointError: missing, truncated, of an unknown version, damaged, or not plain data; the message
            names the file, the tensor and the value, and says what to do.
    """
    path = Path(path)
    _require(
        is_utf8(os.fspath(path)), path, "its name is not UTF-8 text, and torch opens no such file; rename it"
    )
    contents = _read(path)
    try:
        return _validated(path, contents)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, EdkmExportError) or is_out_of_memory(error):
            raise
        # what no check foresaw: a file may hold anything that pickle can say
        raise CheckpointError(
            f"{path}: holds what no release of edkm-export writes ({_first_line(error)}); write the file again."
        ) from error


def _validated(path: Path, contents: Any) -> Checkpoint:
    _require(
        isinstance(contents, dict) and contents.get("format") == FORMAT,
        path,
        f"is not an edkm-export checkpoint; {_make_one()}",
    )
    version = contents.get("format_version")
    _require(
        type(version) is int and version in _READABLE_VERSIONS,
        path,
        f"format version is {version!r}, this release reads 1 to {FORMAT_VERSION}; "
        "write it again with this release, or install the one that wrote it",
    )
    for key in _KEYS:
        _require(
            isinstance(contents.get(key), dict),
            path,
            f"'{key}' is missing or not a dict; write the file again",
        )
        if key not in ("palettized", "dense", "tokenizer", "tied"):
            fault = not_plain(contents[key], key)
            _require(not fault, path, f"{fault}; write the file again")
        odd = next((name for name in contents[key] if isinstance(name, str) and not is_utf8(name)), None)
        _require(odd is None, path, f"{odd!r}: the name is not UTF-8 text; write the file again")
    stored = tracked(contents["palettized"].items(), "validating", "weights")
    palettized = {name: _unpack_palettized(path, name, parts, version) for name, parts in stored}
    dense = contents["dense"]
    for name, tensor in dense.items():
        _check_dense(path, name, tensor)
    twice = palettized.keys() & dense.keys()
    _require(not twice, path, f"{', '.join(sorted(twice))}: both palettized and dense; write the file again")
    for name, target in contents["tied"].items():
        _require(
            isinstance(name, str) and isinstance(target, str) and (target in palettized or target in dense),
            path,
            f"{name}: tied to {target!r}, which is not in the file; write the file again",
        )
        _require(name not in palettized and name not in dense, path, f"{name}: tied and stored at once")
    for name, content in contents["tokenizer"].items():
        plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
        _require(plain, path, f"tokenizer file {name!r} is not a plain file name; refused")
        _require(
            _is_plain(content) and content.dtype == torch.uint8 and content.dim() == 1,
            path,
            f"tokenizer file {name}: expected its bytes as a uint8 tensor",
        )
    embedding = _read_embedding(path, contents.get("embedding"))
    _check_digests(path, contents, version)
    return Checkpoint(
        config=contents["config"],
        palettized=palettized,
        dense=dense,
        tied=contents["tied"],
        tokenizer={name: content.numpy().tobytes() for name, content in contents["tokenizer"].items()},
        recipe=contents["recipe"],
        provenance=contents["provenance"],
        path=path,
        embedding=embedding,
        format_version=version,
    )


def _read_embedding(path: Path, stored: Any) -> EmbeddingSettings | None:
    if stored is None:
        return None
    try:
        return EmbeddingSettings.model_validate(stored)
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(("embedding", *map(str, detail["loc"])))
        raise CheckpointError(f"{path}: {where}: {detail['msg']}; palettize the model again.") from error


def _make_one(path: str | Path = "model.pt") -> str:
    return f"make one with `{command_line('palettize', 'MODEL', '-o', path)}`"


def _read(path: Path) -> Any:
    if unfinished := unfinished_run(path):
        raise CheckpointError(f"{path}: {unfinished}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; {_make_one(path)}.")
    if path.is_dir():
        if (path / "model.pt").is_file():
            raise CheckpointError(f"{path}: is a folder; give the file in it, {path / 'model.pt'}.")
        raise CheckpointError(
            f"{path}: is a folder; to palettize it run `{command_line('palettize', path, '-o', 'model.pt')}`."
        )
    try:
        return load_archive(path)
    except UnsafeArchiveError as error:
        if error.holds_code:
            why = "refused, since it holds more than plain tensors, and loading it could run code"
            raise CheckpointError(f"{path}: {why}; {_make_one()}.") from error
        why = f"is truncated or not an edkm-export checkpoint; {_make_one()} ({error})"
        raise CheckpointError(f"{path}: {why}.") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: no permission to read it.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {_make_one()}.") from error


def _first_line(error: BaseException) -> str:
    lines = words_of(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _require(condition: bool, path: Path, message: str) -> None:
    if not condition:
        raise CheckpointError(printable(f"{path}: {message}."))


def _pack_palettized(tensor: PalettizedTensor) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "shape": list(tensor.shape),
        "n_bits": tensor.n_bits,
        "lut": tensor.lut,
        "indices": tensor.indices,
        "lut_dtype": tensor.lut_dtype,
    }
    if tensor.lut_scale is not None:
        parts["lut_scale"] = tensor.lut_scale
    return parts


def _unpack_palettized(path: Path, name: Any, parts: Any, version: int) -> PalettizedTensor:
    known = {"shape", "n_bits", "lut", "indices", "lut_scale"} | ({"lut_dtype"} if version > 1 else set())
    _require(
        isinstance(name, str) and isinstance(parts, dict) and parts.keys() <= known,
        path,
        f"{name!r}: a palettized weight is a dict of {', '.join(sorted(known))}",
    )
    shape, n_bits, scale = parts.get("shape"), parts.get("n_bits"), parts.get("lut_scale")
    _require(
        isinstance(shape, list) and all(type(size) is int for size in shape),
        path,
        f"{name}: shape is {shape!r}",
    )
    _require(type(n_bits) is int, path, f"{name}: n_bits is {n_bits!r}")
    for key in ("lut", "indices"):
        _require(_is_plain(parts.get(key)), path, f"{name}: '{key}' is missing or not a plain tensor")
    _require(scale is None or _is_plain(scale), path, f"{name}: 'lut_scale' is not a plain tensor")
    lut_dtype = parts.get("lut_dtype")
    _require(version == 1 or lut_dtype is not None, path, f"{name}: 'lut_dtype' is missing")
    try:
        tensor = PalettizedTensor(
            name, tuple(shape), n_bits, parts["lut"], parts["indices"], scale, lut_dtype
        )
        tensor.unpack_indices()  # refuses padding bits that are set
    except PaletteError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return tensor


def _is_plain(value: Any) -> bool:
    """A dense tensor in memory. Sparse, meta and expanded ones can claim any size without having the bytes."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_contiguous()
    )


def _check_dense(path: Path, name: Any, tensor: Any) -> None:
    _require(isinstance(name, str) and _is_plain(tensor), path, f"{name!r}: is not a plain tensor")
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DENSE_DTYPES)
    _require(tensor.dtype in _DENSE_DTYPES, path, f"{name}: is {tensor.dtype}, expected one of {names}")
    _require(all_finite(tensor), path, f"{name}: holds NaN or infinity; the model is broken")


def _check_digests(path: Path, contents: dict[str, Any], version: int) -> None:
    _require(
        isinstance(contents["provenance"].get(RECORD), dict),
        path,
        "provenance holds no sha256 of its parts; write the file again",
    )
    if (found := changed(contents, version)) is None:
        return
    part, actual, recorded = found
    raise CheckpointError(
        f"{path}: the sha256 of its '{part}' part is {actual[:16]}..., but {recorded[:16] or None}... was recorded "
        "when it was written: the file was damaged or changed; write it again."
    )
