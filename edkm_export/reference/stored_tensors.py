"""The safetensors files of a Hugging Face folder: which belong to the model, and what is in them.

Only headers are read here, and a tensor when it is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edkm_export.errors import InputError
from edkm_export.regular_file import read_regular, require_regular

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ADAPTER_CONFIG", "StoredTensor", "StoredTensors", "read_stored"]

ADAPTER_CONFIG = "adapter_config.json"
"""A folder that holds it is, or holds, an adapter."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NOT_WEIGHTS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state*.pth",
    "scaler.pt",
)
_OTHER_FORMATS = {
    "consolidated": "weights in the format of Mistral's own tools, which transformers does not read"
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it; `dtype` by safetensors' name, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass
class StoredTensors:
    """What the files of a folder hold.

    Attributes:
        tensors: by name; that of a text part differs from the one in its file.
        files: the files that they are in.
        index: the index that names the files, None with a single file.
        without_effect: {file: why it is not read}.
        not_understood: {file or tensor: what is wrong with it}.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    index: Path | None = None
    without_effect: dict[str, str] = field(default_factory=dict)
    not_understood: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype and shape."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.tensors[name].name)
        return tensor

    def unpacked(self, shapes: Mapping[str, tuple[int, ...]]) -> StoredTensors:
        """The same, where packed tensors have the shape of what they hold."""
        tensors = {
            name: dataclasses.replace(tensor, shape=shapes.get(name, tensor.shape))
            for name, tensor in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors)

    @contextlib.contextmanager
    def slices(self) -> Iterator[dict[str, Any]]:
        """Every tensor by name, not read yet: `[...]` of it reads it, as long as the context lasts."""
        from safetensors import safe_open

        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in self.files}
            yield {name: files[tensor.file].get_slice(tensor.name) for name, tensor in self.tensors.items()}


def read_stored(folder: Path, reference: str) -> StoredTensors:
    """Find the weights of a folder.

    Args:
        folder: of the model.
        reference: what the user calls it, for messages.

    Raises:
        InputError: there are no safetensors, only pickles, a shard is missing, or a file is damaged.
    """
    found = StoredTensors()
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file() and index.is_file():
        raise InputError(
            f"{reference}: holds {_SINGLE} and {_INDEX}, which names other files; remove the one that is not meant."
        )
    placed: Mapping[str, str] = {}
    if index.is_file():
        placed = _read_index(index, reference)
        names = sorted(set(placed.values()))
        for name in names:
            if not (folder / name).is_file():
                raise InputError(
                    f"{reference}: {name}, which {_INDEX} names, is missing; copy it from where the model is from."
                )
        found.index = index
        found.files = tuple(folder / name for name in names)
    elif single.is_file():
        found.files = (single,)
    else:
        _refuse_without_weights(folder, reference)
    for path in found.files:
        _read_header(found, path, reference)
    for name, file in placed.items():
        if name not in found.tensors:
            raise InputError(f"{reference}: {file} lacks {name}, which {_INDEX} says is in it.")
    if placed:
        for name, tensor in found.tensors.items():
            if name not in placed:
                found.not_understood[name] = f"is in {tensor.file.name}, but {_INDEX} does not name it"
    _look_around(found, folder)
    return found


def _read_index(path: Path, reference: str) -> dict[str, str]:
    try:
        contents: Any = json.loads(read_regular(path))
        placed = contents["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{reference}: {path.name} cannot be read: it has no weight_map.") from error
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{reference}: {path.name} names no weights.")
    for file in placed.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"{reference}: {path.name} names {file!r}, which is no safetensors file beside it."
            )
    return placed


def _read_header(found: StoredTensors, path: Path, reference: str) -> None:
    from safetensors import safe_open

    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, an open file is no mapping
                part = file.get_slice(name)
                if name in found.tensors:
                    found.not_understood[name] = f"is in {found.tensors[name].file.name} and in {path.name}"
                found.tensors[name] = StoredTensor(name, part.get_dtype(), tuple(part.get_shape()), path)
    except Exception as error:  # safetensors' errors have no common base
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{reference}: {path.name} cannot be read ({first}); it is damaged or cut short, copy it again."
        ) from error


def _pickles(folder: Path) -> list[str]:
    found = {path.name for pattern in _PICKLES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - {path.name for pattern in _NOT_WEIGHTS for path in folder.glob(pattern)})


def _refuse_without_weights(folder: Path, reference: str) -> None:
    if pickles := _pickles(folder):
        raise InputError(
            f"{reference}: its weights are pickles ({pickles[0]}), which can run code when they are read; save it "
            "again where you trust it: model.save_pretrained(FOLDER, safe_serialization=True)."
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        raise InputError(
            f"{reference}: holds neither {_SINGLE} nor {_INDEX}, only {others[0]}; save it with save_pretrained."
        )
    raise InputError(
        f"{reference}: holds no weights (*.safetensors); check that the folder holds config.json, *.safetensors and "
        "the tokenizer of one model."
    )


def _look_around(found: StoredTensors, folder: Path) -> None:
    """Weights that lie in the folder and are not read."""
    for path in sorted(folder.glob("*.safetensors")):
        if path in found.files or path.name.startswith("adapter_"):
            continue
        stem = path.name.split(".")[0]
        if stem in _OTHER_FORMATS:
            found.without_effect[path.name] = _OTHER_FORMATS[stem]
        else:
            named = _INDEX if found.index else _SINGLE
            found.not_understood[path.name] = f"is a file of weights that does not belong to {named}"
    for name in _pickles(folder):
        if not name.startswith("adapter_"):
            found.without_effect[name] = "a pickle, which is never read; the safetensors are"
