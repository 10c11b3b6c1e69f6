"""Palettes that other tools learned, from a state dict.

A model that coremltools or coreai-opt has finalized keeps, beside each palettized weight, buffers that describe it:
`<module>._COREML_/<parameter>/lut`, `/compression_type`, `/palettization_scale`, `/quantization_scale` and others
(coremltools, optimize/torch/_utils/metadata_utils.py). The indices are not among them; they follow from the dense
weight, each value of which is an entry of its LUT. What coreai-opt finalizes for Core AI is read by
`finalized_palettes`. Without any such buffers, a weight of few distinct values is a palette.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import decoder_config, empty_decoder
from edkm_export.errors import CheckpointError, PaletteError
from edkm_export.finalized_palettes import FAULTS, split_finalized
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.palette import PalettizedTensor, all_finite, check_grouping
from edkm_export.reference.conv1d import as_linear, conv1d_weights
from edkm_export.reference.source import (
    Source,
    load_config,
    load_tokenizer,
    read_generation_settings,
    read_origin,
    require_language_model,
)
from edkm_export.reference.tokenizer_files import tokenizer_files
from edkm_export.regular_file import require_regular
from edkm_export.torch_archive import UnsafeArchiveError, load_archive
from edkm_export.versions import library_versions

__all__ = ["Imported", "as_checkpoint", "import_state", "read_state"]

_MARK = "_COREML_/"
_PALETTIZATION, _QUANTIZATION = 2, 3  # CompressionType of coremltools; 1 is pruning
_MOST_ENTRIES = 256
_MOST_KINDS = 8  # of compression; more are listed by nobody
_PLACEHOLDER = ".original"  # of coreai-opt, empty where a weight was
_DENSE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN_DTYPES = (
    *_DENSE_DTYPES,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_TOLERANCE = 1e-6  # float32 products that were computed in another order, relative to the largest entry
_BLOCK = 1 << 20  # values looked up at a time


@dataclass
class Imported:
    """What a state dict holds, by parameter name.

    Attributes:
        palettized: weights as lookup tables and indices.
        dense: the others.
    """

    palettized: dict[str, PalettizedTensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, `torch.save`d or safetensors; no code of the file is run.

    Raises:
        CheckpointError: missing, damaged, or more than a dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            require_regular(path)
            found: Any = safetensors.torch.load_file(path)
        else:
            found = load_archive(path, mapped=False)
    except UnsafeArchiveError as error:
        why = f"cannot be read as a state dict ({error})"
        if error.holds_code:
            why = "refused, since it holds more than plain tensors, and loading it could run code"
        raise CheckpointError(
            f"{path}: {why}; save the finalized model's state_dict() with torch.save(model.state_dict(), ...)."
        ) from error
    except Exception as error:  # what damaged files raise has no common base
        raise CheckpointError(f"{path}: cannot be read as a state dict: {error}") from error
    for key in ("state_dict", "model"):  # as trainers nest it
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path}: holds {type(found).__name__}, expected a state dict.")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} is {type(value).__name__}, expected a tensor.")
    return dict(found)


def import_state(state: Mapping[str, Tensor], source: str, group_size: int = 0) -> Imported:
    """Find the palettes of a state dict.

    Args:
        state: tensors by name.
        source: where it is from, for messages.
        group_size: output rows that share a LUT, where no buffers say it; 0: the whole weight.

    Raises:
        CheckpointError: the buffers do not describe the weight, it holds none of the forms that can be kept exactly,
            or there is no palette at all.
    """
    for name, value in state.items():
        _require_plain(source, name, value)
    finalized, state = split_finalized(state, source)
    described = _descriptions(state, source)
    found = Imported(palettized=finalized)
    whole = bool(described or finalized)  # then a weight without a palette was left dense on purpose
    for name, value in tracked(state.items(), "looking for palettes", "tensors"):
        if _MARK in name:
            continue
        if not value.is_floating_point():
            raise CheckpointError(f"{source}: {name} is {value.dtype}, expected floating point.")
        if not all_finite(value):
            raise CheckpointError(f"{source}: {name}: holds NaN or infinity; the model is broken.")
        try:
            if name in described:
                tensor: PalettizedTensor | None = _described(name, value, described[name])
            else:
                tensor = None if whole else _discovered(name, value, group_size)
        except PaletteError as error:
            raise CheckpointError(f"{source}: {error}") from error
        except FAULTS as error:  # shapes and kinds that fit nothing
            raise CheckpointError(f"{source}: {name}: its buffers do not describe it ({error}).") from error
        if tensor is None:
            if value.dtype not in _DENSE_DTYPES:
                raise CheckpointError(f"{source}: {name} is {value.dtype}; save it as float32.")
            found.dense[name] = value.detach().contiguous()
        else:
            found.palettized[name] = tensor
    if missing := described.keys() - found.palettized.keys():
        raise CheckpointError(f"{source}: {min(missing)} is described by its buffers, but is not there.")
    if not found.palettized:
        raise CheckpointError(
            f"{source}: no weight has a palette: there are no {_MARK} buffers, and each weight holds more than "
            f"{_MOST_ENTRIES} values; if LUTs are shared by groups of rows, say so with --group-size."
        )
    return found


def _require_plain(source: str, name: str, value: Tensor) -> None:
    """Refuse what holds no numbers, or fewer than its shape says.

    Raises:
        CheckpointError: a tensor without data, sparse, repeated, empty, or of a type that is none of weights.
    """
    kind = None
    if value.is_quantized or value.layout != torch.strided:
        kind = f"is {'quantized' if value.is_quantized else value.layout}"
    elif value.device.type == "meta":
        kind = "is on the meta device: it has a shape, but no data"
    elif value.dtype not in _PLAIN_DTYPES:
        kind = f"is {value.dtype}"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        kind = f"of shape {list(value.shape)} repeats fewer values"
    elif not value.numel() and not name.endswith(_PLACEHOLDER):
        kind = f"of shape {list(value.shape)} is empty"
    if kind is not None:
        raise CheckpointError(f"{source}: {name} {kind}; a state dict holds plain tensors, save it anew.")


def _descriptions(state: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """{parameter: {key: buffer}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        module, mark, rest = name.partition(_MARK)
        if not mark or rest == "metadata_version":
            continue
        parameter, _, key = rest.rpartition("/")
        if not parameter:
            raise CheckpointError(f"{source}: buffer {name} names no parameter.")
        found.setdefault(module + parameter, {})[key] = value
    return found


def _described(name: str, weight: Tensor, buffers: Mapping[str, Tensor]) -> PalettizedTensor:
    """A weight as its buffers say."""
    given = buffers.get("compression_type", torch.tensor([], dtype=torch.int64)).reshape(-1).tolist()
    kinds = [int(kind) if math.isfinite(kind) and kind == int(kind) else kind for kind in given[:_MOST_KINDS]]
    if kinds not in ([_PALETTIZATION], [_PALETTIZATION, _QUANTIZATION]) or "lut" not in buffers:
        raise PaletteError(
            f"{name}: its compression types are {kinds}; only palettization (2), with or without an int8 LUT (3), can "
            "be kept exactly."
        )
    lut = buffers["lut"].detach().float()
    if lut.dim() == weight.dim() + 1:
        lut = lut.unsqueeze(-1)
    if lut.dim() != weight.dim() + 2 or any(size != 1 for size in lut.shape[2:-2]):
        raise PaletteError(f"{name}: LUT {list(lut.shape)} does not fit its shape {list(weight.shape)}.")
    lut = lut.reshape(*lut.shape[:2], *lut.shape[-2:])  # [groups_out, groups_in, entries, dim]
    axis = _whole(name, buffers, "vector_axis", 0)
    if lut.shape[-1] > 1 and axis % weight.dim() != 0:
        raise PaletteError(f"{name}: vectors run along axis {axis}, only the output axis (0) can be held.")
    scale = buffers.get("palettization_scale")
    if scale is not None:
        if len(kinds) > 1:
            raise PaletteError(f"{name}: an int8 LUT with a scale for each channel cannot be kept exactly.")
        lut = _with_channel_scale(name, lut, scale.detach().float(), weight.shape[0])
    indices = _indices(name, weight, lut)
    if len(kinds) == 1:
        return _built(name, lut.half(), indices, tuple(weight.shape), None)
    return _int8(name, lut, indices, tuple(weight.shape), buffers)


def _whole(name: str, buffers: Mapping[str, Tensor], key: str, default: int) -> int:
    """A buffer that is one whole number."""
    if key not in buffers:
        return default
    values = buffers[key].reshape(-1).tolist() if buffers[key].numel() == 1 else []
    if len(values) != 1 or not math.isfinite(values[0]) or values[0] != int(values[0]):
        raise PaletteError(f"{name}: {key} is {buffers[key]!r:.60}, expected one whole number.")
    return int(values[0])


def _with_channel_scale(name: str, lut: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Fold a scale for each output channel into a LUT for each: an op after the lookup crashes on devices."""
    if scale.numel() != rows or scale.shape[0] != rows or lut.shape[-1] > 1:
        raise PaletteError(
            f"{name}: scale {list(scale.shape)} is not one for each of its {rows} output rows."
        )
    return lut.repeat_interleave(rows // lut.shape[0], 0) * scale.view(rows, 1, 1, 1)


def _int8(
    name: str, lut: Tensor, indices: Tensor, shape: tuple[int, ...], buffers: Mapping[str, Tensor]
) -> PalettizedTensor:
    """The LUT on its int8 grid."""
    bits, scale = _whole(name, buffers, "quantization_n_bits", 0), buffers.get("quantization_scale")
    zero = buffers.get("zero_point")
    if bits != 8 or scale is None or (zero is not None and bool((zero != 0).any())):
        raise PaletteError(f"{name}: its LUT is not symmetric int8, which is what can be kept exactly.")
    groups = scale.detach().float().reshape(*scale.shape[:2], -1)
    if groups.shape[-1] != 1 or any(of % own for of, own in zip(lut.shape, groups.shape[:2], strict=False)):
        raise PaletteError(f"{name}: LUT scale {list(scale.shape)} does not fit LUT {list(lut.shape)}.")
    spread = groups[..., 0].repeat_interleave(lut.shape[0] // groups.shape[0], 0)
    spread = spread.repeat_interleave(lut.shape[1] // groups.shape[1], 1)
    grid = lut / spread[..., None, None]
    if not torch.allclose(grid, grid.round(), atol=1e-3) or float(grid.abs().max()) > 128.5:
        raise PaletteError(f"{name}: its LUT is not a multiple of its int8 scale.")
    return _built(name, grid.round().clamp(-128, 127).to(torch.int8), indices, shape, spread.half())


def _discovered(name: str, weight: Tensor, group_size: int) -> PalettizedTensor | None:
    """A palette of the values that a weight takes; None when there are too many."""
    if weight.dim() < 2:
        return None
    check_grouping(name, weight.shape[0], group_size)
    blocks = weight.detach().float().reshape(weight.shape[0] // group_size if group_size else 1, -1)
    values = []
    for block in blocks:
        entries = block.unique()
        if len(entries) > _MOST_ENTRIES:
            return None
        values.append(entries)
    longest = max(len(entries) for entries in values)
    lut = torch.stack(
        [torch.cat((entries, entries[-1:].expand(longest - len(entries)))) for entries in values]
    )
    lut = lut.view(len(values), 1, longest, 1)
    return _built(name, lut.half(), _indices(name, weight, lut), tuple(weight.shape), None)


def _indices(name: str, weight: Tensor, lut: Tensor) -> Tensor:
    """Which entry each value of a weight is, uint8 [out / dim, in * kernel].

    Args:
        name: of the weight.
        weight: `shape`.
        lut: float32 [groups_out, groups_in, entries, dim].
    """
    groups_out, groups_in, entries, dim = lut.shape
    matrix = weight.detach().float().reshape(weight.shape[0], -1)
    rows, columns = matrix.shape
    if entries > _MOST_ENTRIES or rows % (dim * groups_out) or columns % groups_in:
        raise PaletteError(f"{name}: LUT {list(lut.shape)} does not fit its shape {list(weight.shape)}.")
    found = torch.empty(rows // dim, columns, dtype=torch.uint8)
    tall, wide = rows // groups_out, columns // groups_in
    limit = _TOLERANCE * float(lut.abs().max())
    for group in range(groups_out):
        for column in range(groups_in):
            block = matrix[group * tall : (group + 1) * tall, column * wide : (column + 1) * wide]
            vectors = block.reshape(tall // dim, dim, wide).transpose(1, 2).reshape(-1, dim)
            nearest = torch.empty(len(vectors), dtype=torch.uint8)
            for start in range(0, len(vectors), _BLOCK // entries):
                part = vectors[start : start + _BLOCK // entries]
                distances = (part[:, None] - lut[group, column]).abs().amax(-1)  # [values, entries]
                least, index = distances.min(-1)
                if float(least.max()) > limit:
                    worst = float(part[least.argmax()][0])
                    raise PaletteError(
                        f"{name}: holds {worst:.6g}, which is no entry of its LUT; import the model as it was "
                        "finalized, before any further training or rounding."
                    )
                nearest[start : start + len(part)] = index.byte()
            found[group * tall // dim : (group + 1) * tall // dim, column * wide : (column + 1) * wide] = (
                nearest.view(tall // dim, wide)
            )
    return found


def _built(
    name: str, lut: Tensor, indices: Tensor, shape: tuple[int, ...], scale: Tensor | None
) -> PalettizedTensor:
    """A PalettizedTensor, its LUT filled up to a supported number of bits with entries that no index selects."""
    entries = lut.shape[2]
    bits = next((bits for bits in SUPPORTED_BITS if 1 << bits >= entries), None)
    if bits is None:
        raise PaletteError(f"{name}: {entries} entries are more than 8 bits select.")
    filler = lut[:, :, -1:].expand(-1, -1, (1 << bits) - entries, -1)
    filled = torch.cat((lut, filler), 2).contiguous()
    kernel = shape[1:] if len(shape) > 2 else (indices.shape[1],)
    return PalettizedTensor.from_indices(
        name, filled, indices.reshape(indices.shape[0], *kernel), shape=shape, lut_scale=scale
    )


def as_checkpoint(imported: Imported, model: Source, file: str | Path, command: list[str]) -> Checkpoint:
    """Complete what was imported with the configuration and tokenizer of the model that was palettized.

    Args:
        imported: from `import_state`.
        model: the model; its weights are not read.
        file: where the palettes are from.
        command: for the provenance.

    Raises:
        InputError: the model cannot be used.
        CheckpointError: the parameters are not those of the model.
        ConversionError: its family is not supported.
    """
    file = Path(file)
    import accelerate
    import transformers

    require_language_model(model, "import")
    config = load_config(model, weights=False)
    with accelerate.init_empty_weights():
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    if (generation := read_generation_settings(model)) is not None:
        skeleton.generation_config = transformers.GenerationConfig.from_dict(generation)
    files = tokenizer_files(load_tokenizer(model), skeleton)
    config.eos_token_id = skeleton.config.eos_token_id
    tied = _tied(imported, config)
    turned = conv1d_weights(skeleton)
    if wrong := turned & imported.palettized.keys():
        raise CheckpointError(
            f"{file}: {min(wrong)} is a palettized Conv1D, whose palettes run along the wrong axis; palettize the "
            "model with edkm-export."
        )
    made = Checkpoint(
        config=config.to_dict(),
        palettized=imported.palettized,
        dense=as_linear(skeleton, imported.dense),
        tied=tied,
        tokenizer=files,
        recipe={"name": "imported", "file": file.name},
        provenance={
            "versions": library_versions(),
            "command": command,
            "seed": None,
            "base_model": {"reference": model.place},
            "origin": read_origin(model).provenance(),
        },
        path=file,
    )
    empty_decoder(made)  # refuses a family or parameters that could not be exported
    return made


def _tied(imported: Imported, config: Any) -> dict[str, str]:
    """Take the output head out where it is the embedding; where it is not, say so in the configuration."""
    head = "lm_head.weight"
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    names = decoder_config(config.to_dict(), "the model's configuration").names
    embedding = f"{names.stack}.{names.embedding}.weight"
    if head in imported.palettized and embedding in imported.palettized:
        same = imported.palettized[head].same_bits(imported.palettized[embedding])
        same = same or torch.equal(
            imported.palettized[head].decode(), imported.palettized[embedding].decode()
        )
    elif head in imported.dense and embedding in imported.dense:
        same = torch.equal(imported.dense[head], imported.dense[embedding])
    else:
        same = head not in imported.palettized and head not in imported.dense
    if not same:
        config.tie_word_embeddings = False
        return {}
    imported.palettized.pop(head, None)
    imported.dense.pop(head, None)
    return {head: embedding}
