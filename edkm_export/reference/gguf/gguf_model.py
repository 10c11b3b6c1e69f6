"""A GGUF file as a model: account, configuration, weights and tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.config_bounds import check_config
from edkm_export.errors import SourceError
from edkm_export.guarded_tokenizer import guarded
from edkm_export.reference.account import Account
from edkm_export.reference.built_config import built_config
from edkm_export.reference.float_weights import FloatWeights
from edkm_export.reference.gguf.architectures import ARCHITECTURES
from edkm_export.reference.gguf.gguf_file import GgufFile
from edkm_export.reference.gguf.gguf_settings import GgufSettings
from edkm_export.reference.gguf.gguf_tokenizer import Vocabulary
from edkm_export.reference.gguf.gguf_weights import fill, read_parameter, skeleton, wrong_shapes
from edkm_export.reference.gguf.tensor_names import places
from edkm_export.reference.origin import gguf_origin
from edkm_export.reference.streamed_model import shared_names, stream
from edkm_export.reference.weight_range import check_weight

__all__ = ["GgufModel", "read_gguf"]


def read_gguf(path: Path | str) -> GgufModel:
    """Read a file's metadata and where its tensors lie; the other parts of a split file are found beside it.

    Raises:
        InputError: a part is missing or damaged.
        SourceError: an architecture that is not supported, or a value that makes no sense.
        BackendMissingError: gguf is not installed.
    """
    return GgufModel(GgufFile.open(Path(path)))


class GgufModel:
    """What a file says, and the transformers model and tokenizer that say the same.

    Attributes:
        file: metadata and tensors.
        parts: the files that it consists of.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file, self.parts = file, file.parts
        settings = GgufSettings(file)
        if settings.arch not in ARCHITECTURES:
            raise SourceError(
                f"{file.path}: architecture {settings.arch!r} is not supported; supported are "
                f"{', '.join(sorted(ARCHITECTURES))}."
            )
        self._architecture = ARCHITECTURES[settings.arch]
        told = {name: file.metadata.get(f"{settings.arch}.{key}") for key, name in _COUNTS.items()}
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        check_config(told, str(file.path), shapes, SourceError)  # before anything is listed that many times
        self._described = self._architecture.describe(settings, file)
        self._places = places(self._architecture, self._described)
        self._vocabulary = Vocabulary(settings)
        settings.finish()
        self._settings = settings

    @property
    def values(self) -> int:
        """Values of all tensors together, for a progress bar."""
        return sum(tensor.numel for tensor in self.file.tensors.values())

    def account(self) -> Account:
        """What became of every tensor and every key."""
        return self._account

    @functools.cached_property
    def _account(self) -> Account:
        settings = self._settings
        not_understood = dict(settings.not_understood)
        if not not_understood:
            not_understood |= self._tensors_out_of_place()
        if not not_understood:
            not_understood |= wrong_shapes(self._skeleton(torch.float16), self.file, self._places)
        absent = [
            name for name, place in self._places.items() if place.optional and name not in self.file.tensors
        ]
        zero = sorted({name.split(".", 2)[2] for name in absent})
        remarks = [f"{', '.join(zero)} of the layers are zeros: the file holds none"] if zero else []
        if "output.weight" in self.file.tensors and "output.weight" not in self._places:
            remarks.append("output.weight is token_embd.weight over again: the output head is the embedding")
        used = [
            name
            for name in self.file.tensors
            if name in self._places or name in self._described.tensors or name == "output.weight"
        ]
        return Account(
            source=str(self.file.path),
            kind=f"GGUF file ({settings.arch}, {self._types()})",
            tensors=tuple(name for name in used if name not in not_understood),
            settings=dict(settings.used),
            without_effect=dict(settings.without_effect),
            not_understood=not_understood,
            remarks=tuple(remarks),
            origin=gguf_origin(self.file.metadata),
        )

    def _types(self) -> str:
        kinds = sorted({tensor.kind for tensor in self.file.tensors.values()})
        parts = f", {len(self.parts)} parts" if len(self.parts) > 1 else ""
        return ", ".join(kinds) + parts

    def _tensors_out_of_place(self) -> dict[str, str]:
        """Tensors that the model has no place for, and places without a tensor."""
        known = {*self._places, *self._described.tensors, "output.weight"}
        found = {
            name: f"a model of architecture {self._settings.arch} has no place for this tensor"
            for name in self.file.tensors
            if name not in known
        }
        held = {_in_all_layers(name) for name in self.file.tensors}
        for name, place in self._places.items():
            if name not in self.file.tensors and not (place.optional and _in_all_layers(name) not in held):
                found[name] = f"this tensor is missing, which is {place.parameter}"
        return found

    def config(self) -> Any:
        """The `PretrainedConfig`.

        Raises:
            SourceError: a part of the file is not understood, or the configuration is not possible.
        """
        self._settings_understood()
        try:
            return built_config({"model_type": self._described.model_type, **self._described.config})
        except Exception as error:  # configurations check themselves, with errors of several classes
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise SourceError(f"{self.file.path}: its metadata makes no model ({lines[0]}).") from error

    def _settings_understood(self) -> None:
        Account(str(self.file.path), "", not_understood=self._settings.not_understood).require_understood()

    def _skeleton(self, dtype: torch.dtype) -> Any:
        try:
            return skeleton(self.config(), dtype)
        except SourceError:
            raise
        except Exception as error:  # sizes that do not fit together
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise SourceError(f"{self.file.path}: its metadata makes no model ({lines[0]}).") from error

    def load_model(
        self, dtype: torch.dtype | None = None, advance: Callable[[int], None] | None = None
    ) -> Any:
        """The model, in eval mode on the CPU. Tensors are decoded one after the other, into this dtype.

        Args:
            dtype: of the parameters; None: float16. float32 holds what the file says exactly.
            advance: called with the number of values of each tensor when it is read; `values` in all.

        Returns:
            transformers.PreTrainedModel.

        Raises:
            SourceError: a part of the file is not understood, or holds values that the dtype does not.
        """
        self.account().require_understood()
        dtype = dtype or torch.float16
        model = self._skeleton(dtype)
        fill(model, self.file, self._places, dtype, advance)
        return model.eval().requires_grad_(False)

    def stream_model(self, dtype: torch.dtype | None, room_bytes: int) -> Any:
        """The model in eval mode, its tensors decoded layer by layer while it runs.

        Args:
            dtype: of the parameters; None: float16.
            room_bytes: what weights may take in memory, see `streamed_model`.

        Returns:
            transformers.PreTrainedModel.

        Raises:
            SourceError: see `load_model`.
            InputError: a weight holds what float16 cannot hold.
        """
        kind = dtype or torch.float16
        opened = self.open_weights(kind)
        for place in self._places.values():
            check_weight(place.parameter, opened.read(place.parameter), str(self.file.path))
        return stream(opened.model, opened.read, keys=opened.keys, dtype=kind, room_bytes=room_bytes)

    def open_weights(self, dtype: torch.dtype) -> FloatWeights:
        """The model without weights, and how to decode each of them, in this dtype.

        Raises:
            SourceError: see `load_model`.
        """
        self.account().require_understood()
        model = self._skeleton(dtype)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        names = {place.parameter: name for name, place in self._places.items()}

        def read(parameter: str) -> Tensor:
            name = names[parameter]
            return read_parameter(self.file, name, self._places[name], shapes[parameter], dtype)

        model.tie_weights()
        keys = shared_names(model)
        return FloatWeights(str(self.file.path), model.eval().requires_grad_(False), read, dtype, keys)

    def load_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            SourceError: the file holds none, or a part of it is not understood.
        """
        self._settings_understood()
        if self._vocabulary.is_empty:  # said in its own words, before a process is made for it
            return self._vocabulary.build()
        size_bytes = _TOKEN_BYTES * len(self._vocabulary.tokens)
        return guarded(self._vocabulary.build, str(self.file.path), size_bytes)


_TOKEN_BYTES = 128  # of a token and its merge in a tokenizer.json

_COUNTS = {
    "block_count": "num_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "rope.dimension_count": "rotary_dim",
    "vocab_size": "vocab_size",
}


def _in_all_layers(name: str) -> str:
    """Name of a tensor without the number of its layer."""
    parts = name.split(".")
    return ".".join([parts[0], *parts[2:]]) if parts[0] == "blk" else name
