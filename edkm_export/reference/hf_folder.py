"""A Hugging Face folder: its account, and the model of transformers that it holds."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edkm_export.config_bounds import check_config
from edkm_export.errors import InputError
from edkm_export.guarded_tokenizer import open_tokenizer
from edkm_export.reference.account import Account
from edkm_export.reference.built_config import built_config
from edkm_export.reference.config_fields import ConfigFields, sort_fields
from edkm_export.reference.origin import Origin, folder_origin
from edkm_export.reference.placement import CONSTANTS, Placement
from edkm_export.reference.quantized_weights import check_quantized, finer_scales, loading_arguments
from edkm_export.reference.stored_tensors import StoredTensors, read_stored
from edkm_export.reference.text_part import TextPart, text_of
from edkm_export.reference.weight_range import check_weight
from edkm_export.regular_file import read_regular, require_regular_folder
from edkm_export.special_floats import decode_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edkm_export.reference.float_weights import FloatWeights

__all__ = ["HfFolder", "stored_dtype"]

_TIED = "tie_word_embeddings"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_READ = (".json", ".safetensors", ".model", ".jinja", ".txt", ".md")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class HfFolder:
    """A folder with config.json, safetensors and a tokenizer.

    Attributes:
        reference: what the user gave.
        path: the folder.
    """

    reference: str
    path: Path

    def account(self) -> Account:
        """What becomes of every tensor and every field of config.json.

        Raises:
            InputError: files are missing, damaged or pickles.
        """
        part = self._text_part()
        config = part.config
        fields = sort_fields(config)
        stored = self._stored()
        dequantized = check_quantized(config, stored.tensors)
        # how weights are quantized comes first: the rest may follow from it
        refused = dequantized.not_understood | stored.not_understood | fields.not_understood
        refused |= dequantized.not_understood
        without_effect = {
            **part.without_effect,
            **fields.without_effect,
            **stored.without_effect,
            **dequantized.without_effect,
        }
        remarks = list(dequantized.remarks)
        used = fields.used
        names = tuple(stored.tensors)
        if not fields.not_understood:
            skeleton = self._skeleton(self._built_config(config, fields, stored, untied=False))
            others = dequantized.scales | dequantized.without_effect.keys()
            placed = Placement.of(skeleton, stored.unpacked(dequantized.shapes), others)
            if config.get(_TIED, skeleton.config.tie_word_embeddings):
                remarks += self._account_for_head(placed, stored)
            refused |= {
                name: why
                for name, why in {**placed.not_understood, **placed.missing()}.items()
                if name not in refused
            }
            without_effect |= placed.without_effect
            names = tuple(name for name in names if name not in without_effect)
        if any(tensor.dtype == "F64" for tensor in stored.tensors.values()):
            remarks.append("float64 weights were rounded to float32")
        return Account(
            source=self.reference,
            kind=f"Hugging Face folder ({_class_name(self._read_config())}{', its text part' * part.renamed})",
            tensors=tuple(name for name in names if name not in refused),
            settings=used,
            without_effect=without_effect,
            not_understood=refused,
            remarks=tuple(remarks),
            origin=self.origin(),
        )

    def config(self, *, weights: bool = True) -> Any:
        """The `PretrainedConfig` without fields that nothing reads; untied where the head is a weight of its own.

        Args:
            weights: look at the weights for that; False: the configuration alone is wanted.

        Raises:
            InputError: config.json is damaged, or transformers refuses a value.
            SourceError: a field is not understood.
        """
        config = self._text_part().config
        fields = sort_fields(config)
        Account(self.reference, "", not_understood=fields.not_understood).require_understood()
        if not weights:
            return self._built_config(config, fields, None, untied=False)
        stored = self._stored()
        return self._built_config(config, fields, stored, untied=self._has_own_head(config, fields, stored))

    def load_model(
        self, dtype: torch.dtype | None = None, advance: Callable[[int], None] | None = None
    ) -> Any:
        """Load the model in eval mode, on the CPU.

        Args:
            dtype: of the weights; None: bfloat16 or float16 where all are stored so, else float32.
            advance: is not called; transformers loads a folder in one go.

        Returns:
            transformers.PreTrainedModel, without a quantizer attached.

        Raises:
            SourceError: a part of the folder is not understood.
            InputError: it cannot be loaded.
        """
        import transformers

        self.account().require_understood()
        raw, config = self._text_part().config, self.config()
        if "quantization_config" in raw:
            config.quantization_config = raw["quantization_config"]
        stored = self._stored()
        arguments = {
            "config": config,
            "dtype": dtype or stored_dtype(stored),
            "use_safetensors": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            **loading_arguments(raw),
        }
        with self._staged(stored) as folder:
            finer = finer_scales(raw, stored)
            if finer or self._text_part().renamed:
                with stored.slices() as slices:
                    model, found = type(self._skeleton(config)).from_pretrained(
                        None, trust_remote_code=False, state_dict={**slices, **finer}, **arguments
                    )
                model.generation_config = transformers.GenerationConfig.from_pretrained(
                    folder, trust_remote_code=False
                )
            else:
                model, found = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, trust_remote_code=False, **arguments
                )
        _check_loaded(self.reference, found)
        model.config._name_or_path = ""  # a temporary folder
        if "quantization_config" in raw:
            _forget_quantizer(model)
        return model.eval().requires_grad_(False)

    def stream_model(self, dtype: torch.dtype | None, room_bytes: int) -> Any | None:
        """The model in eval mode, its weights read from the files layer by layer while it runs.

        Args:
            dtype: of the weights; None: see `load_model`.
            room_bytes: what weights may take in memory, see `streamed_model`.

        Returns:
            transformers.PreTrainedModel; None for quantized weights, of which several tensors make one parameter.

        Raises:
            SourceError, InputError: see `load_model`; a weight holds NaN, infinity, or what float16 cannot hold.
        """
        stored = self._stored()
        dtype = dtype or stored_dtype(stored)
        opened = self.open_weights(dtype)
        if opened is None:
            return None
        from edkm_export.reference.streamed_model import stream  # it takes torch

        for name, place in self._held(opened.model, stored, opened.keys).items():
            check_weight(name, stored.read(place), self.reference)
        return stream(opened.model, opened.read, keys=opened.keys, dtype=dtype, room_bytes=room_bytes)

    def open_weights(self, dtype: torch.dtype) -> FloatWeights | None:
        """The model without weights, and how to read each of them from the files, in this dtype.

        Returns:
            None for quantized weights, of which several tensors make one parameter.

        Raises:
            SourceError, InputError: see `load_model`.
        """
        if "quantization_config" in self._text_part().config:
            return None
        self.account().require_understood()
        import transformers

        from edkm_export.reference.float_weights import FloatWeights
        from edkm_export.reference.streamed_model import shared_names  # it takes torch

        stored, config = self._stored(), self.config()
        model = self._skeleton(config, dtype)
        with self._staged(stored) as folder:
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                folder, trust_remote_code=False
            )
        model.tie_weights()
        keys = shared_names(model)
        held = self._held(model, stored, keys)

        def read(key: str) -> Tensor:
            return stored.read(held[key])

        return FloatWeights(self.reference, model.eval().requires_grad_(False), read, dtype, keys)

    def _held(self, model: Any, stored: StoredTensors, keys: Mapping[str, str]) -> dict[str, str]:
        """{key of a parameter: the stored tensor that it is}."""
        places = Placement.of(model, stored, set()).places
        return {keys.get(name, name): place for name, place in places.items()}

    def load_tokenizer(self) -> Any:
        """The tokenizer of the folder. Remote code is never run.

        Raises:
            InputError: there is none.
        """
        if not self.has_tokenizer():
            raise InputError(
                f"{self.reference}: holds no tokenizer (tokenizer.json); copy it from the model that this one is from."
            )
        return open_tokenizer(self.path, self.reference)

    def has_tokenizer(self) -> bool:
        """Whether there is a file of a tokenizer."""
        return any((self.path / name).is_file() for name in _TOKENIZERS)

    def origin(self) -> Origin:
        """Licence and hub id, as far as its files name them."""
        return folder_origin(self.path, self._read_config())

    def generation_settings(self) -> dict[str, Any] | None:
        """Contents of generation_config.json; None without one.

        Raises:
            InputError: it is no JSON object.
        """
        path = self.path / "generation_config.json"
        return _read_object(path, self.reference) if path.is_file() else None

    def _text_part(self) -> TextPart:
        return text_of(self._read_config())

    def _stored(self) -> StoredTensors:
        return self._text_part().tensors(read_stored(self.path, self.reference))

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        if not path.is_file():
            raise InputError(
                f"{self.reference}: holds no config.json, so it is not a Hugging Face model folder."
            )
        self._require_regular()
        return _read_object(path, self.reference)

    def _require_regular(self) -> None:
        """Refuse what libraries would open by its name although it is a pipe, a device or a loop of links."""
        try:
            require_regular_folder(self.path, _READ)
        except OSError as error:
            raise InputError(f"{self.reference}: {error.filename}: {error.strerror}.") from error

    def _built_config(
        self, config: Mapping[str, Any], fields: ConfigFields, stored: StoredTensors | None, *, untied: bool
    ) -> Any:
        kept = {
            name: value
            for name, value in config.items()
            if name not in fields.forgotten and name != "quantization_config"
        }
        if untied:
            kept[_TIED] = False
        shapes = None if stored is None else {name: each.shape for name, each in stored.tensors.items()}
        check_config(kept, self.reference, shapes)
        return built_config(kept)

    def _has_own_head(self, config: Mapping[str, Any], fields: ConfigFields, stored: StoredTensors) -> bool:
        """Whether the head that is stored differs from the embedding that it should be tied to."""
        built = self._built_config(config, fields, stored, untied=False)
        if not built.tie_word_embeddings:
            return False
        return Placement.of(self._skeleton(built), stored, set()).heads_differ(stored)

    def _account_for_head(self, placed: Placement, stored: StoredTensors) -> list[str]:
        if placed.heads_differ(stored):
            return [
                f"{placed.head} differs from {placed.embedding}, so it stays a weight of its own, although "
                f"config.json says {_TIED}"
            ]
        if placed.head in placed.places:
            twin = placed.places[placed.head]
            placed.without_effect[twin] = f"the same values as {placed.embedding}, to which it is tied"
        return []

    def _skeleton(self, config: Any, dtype: torch.dtype | None = None) -> Any:
        """The model without weights, but with its constants; None: in the dtype that the configuration names."""
        import accelerate
        import transformers

        arguments = {} if dtype is None else {"dtype": dtype}
        with accelerate.init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, **arguments)

    @contextlib.contextmanager
    def _staged(self, stored: StoredTensors) -> Iterator[Path]:
        """A folder with nothing but the weights: transformers looks for adapters and other files on its own."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for path in (*stored.files, *([stored.index] if stored.index else [])):
                (folder / path.name).symlink_to(path.resolve())
            settings = self.generation_settings()
            if settings is None:  # transformers fails without this file
                config = self._text_part().config
                settings = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name) is not None}
            (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
            yield folder


def stored_dtype(stored: StoredTensors) -> torch.dtype:
    """The narrowest type that holds every stored value."""
    import torch

    kinds = {tensor.dtype for tensor in stored.tensors.values()}
    if kinds == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if kinds == {"F16"} else torch.float32


def _check_loaded(reference: str, found: Mapping[str, Any]) -> None:
    """Refuse a model of which parts were made up: transformers fills in what is missing with random numbers."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"{reference}: parameter {missing[0]} is missing from its weights.")
    mismatched = sorted(str(each[0]) for each in found["mismatched_keys"])
    if mismatched:
        raise InputError(f"{reference}: parameter {mismatched[0]} has another shape than config.json says.")
    unexpected = sorted(name for name in found["unexpected_keys"] if not name.endswith(CONSTANTS))
    if unexpected:
        raise InputError(f"{reference}: parameter {unexpected[0]} is not part of the model in config.json.")


def _forget_quantizer(model: Any) -> None:
    """Weights arrive dequantized, but the model still claims to be quantized and refuses to be saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)


def _read_object(path: Path, reference: str) -> dict[str, Any]:
    try:
        contents = json.loads(read_regular(path), object_hook=decode_object)
    except OSError as error:
        raise InputError(f"{reference}: {path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{reference}: {path.name} cannot be read: it is no JSON.") from error
    if not isinstance(contents, dict):
        raise InputError(f"{reference}: {path.name} is no JSON object.")
    return contents


def _class_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type"))
