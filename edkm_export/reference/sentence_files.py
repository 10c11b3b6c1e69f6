"""The files that sentence-transformers keeps beside a model: modules, pooling, dense layers, prompts.

Every module and every field is used, known to change no embedding, or named as not understood, as with config.json.
Facts are those of sentence-transformers 6.2: `base/modules/`, `sentence_transformer/modules/pooling.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from edkm_export.embedding_settings import Activation, DenseSettings, EmbeddingSettings
from edkm_export.errors import InputError
from edkm_export.regular_file import read_regular

__all__ = ["MODULES", "SentenceFiles", "is_sentence_folder", "read_sentence_files"]

MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
# The file of the transformer module, which older releases named after the model type.
_TRANSFORMER = "sentence_*_config.json"
_PACKAGE = "sentence_transformers."

_SUPPORTED_POOLING = ("mean", "cls", "lasttoken")
_MODE_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Activation] = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
}
_VECTOR = "sentence_embedding"
_SAVED = "says how the file was made"


def is_sentence_folder(folder: Path) -> bool:
    """Whether a folder holds an embedding model of sentence-transformers."""
    return (folder / MODULES).is_file()


@dataclass
class SentenceFiles:
    """What the files say.

    Attributes:
        used: {file and field: value}.
        without_effect: {file and field: why not}.
        not_understood: {file and field: what is missing}.
        dense: {prefix of the parameters of a dense layer: its folder}.
        layers: {the same prefix: what the layer is}.
        settings: None where something is not understood.
    """

    used: dict[str, Any] = field(default_factory=dict)
    without_effect: dict[str, str] = field(default_factory=dict)
    not_understood: dict[str, str] = field(default_factory=dict)
    dense: dict[str, Path] = field(default_factory=dict)
    layers: dict[str, DenseSettings] = field(default_factory=dict)
    settings: EmbeddingSettings | None = None


def read_sentence_files(folder: Path, reference: str, *, hidden_size: int, positions: int) -> SentenceFiles:
    """Read the files of a folder.

    Args:
        folder: with modules.json.
        reference: what the user calls it, for messages.
        hidden_size: channels of the model's token vectors.
        positions: longest text that the model takes.

    Raises:
        InputError: a file is missing or is no JSON.
    """
    return _Reader(folder, reference, hidden_size, positions).read()


class _Reader:
    """Goes through the modules in their order; `width` is that of the vector so far."""

    def __init__(self, folder: Path, reference: str, hidden_size: int, positions: int) -> None:
        self.folder, self.reference, self.width, self.positions = folder, reference, hidden_size, positions
        self.found = SentenceFiles()
        self.given: dict[str, Any] = {"dense": [], "normalize": False}
        self.stage = "transformer"

    def read(self) -> SentenceFiles:
        for module in self._modules():
            kind, path = module["type"].rpartition(".")[2], module["path"]
            own = module["type"].startswith(_PACKAGE)
            read = _KINDS.get(kind) if own else None
            name = f"{MODULES}: {module['path'] or kind}"
            if read is None:
                code = "" if own else " of other Python code, which is not run"
                self.found.not_understood[name] = (
                    f"is a module {module['type']!r}{code}; understood are {', '.join(_KINDS)}"
                )
            elif why := self._out_of_order(kind):
                self.found.not_understood[name] = why
            else:
                self.found.used[name] = kind
                read(self, path)
        if "pooling" not in self.given and not self.found.not_understood:
            self.found.not_understood[MODULES] = "has no Pooling module, so it makes no embedding"
        self._read_texts()
        if not self.found.not_understood:
            try:
                self.found.settings = EmbeddingSettings.model_validate(self.given)
            except pydantic.ValidationError as error:
                detail = error.errors()[0]
                named = ".".join(map(str, detail["loc"])) or _PROMPTS
                self.found.not_understood[named] = detail["msg"].removeprefix("Value error, ")
        return self.found

    def _modules(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self._json(MODULES, list)
        for module in listed:
            path = module.get("path", "") if isinstance(module, dict) else None
            plain = isinstance(path, str) and len(PurePosixPath(path).parts) <= 1 and path not in ("..", "/")
            if not plain or not isinstance(module.get("type"), str):
                raise InputError(
                    f"{self.reference}: {MODULES}: {module!r:.120} is no module with a type and a plain path."
                )
            module.setdefault("path", "")
            if module.get("kwargs"):
                self.found.not_understood[f"{MODULES}: {path}: kwargs"] = f"is {module['kwargs']!r:.80}"
        return listed

    def _out_of_order(self, kind: str) -> str:
        """Why a module may not stand here; the order is Transformer, Pooling, Dense and so on, Normalize."""
        stages = {"Transformer": ("transformer", "pooling"), "Pooling": ("pooling", "dense")}
        stages |= {"Dense": ("dense", "dense"), "Normalize": ("dense", "end")}
        if kind not in stages:
            return ""
        expected, following = stages[kind]
        if self.stage != expected:
            return (
                f"a {kind} module here is not understood: the order is Transformer, Pooling, Dense, Normalize"
            )
        self.stage = following
        return ""

    def _transformer(self, path: str) -> None:
        if path:
            self.found.not_understood[f"{MODULES}: {path}"] = (
                "holds the model in a folder of its own, as older releases saved it; load it with "
                "sentence-transformers and save it again"
            )
        files = sorted(each.name for each in self.folder.glob(_TRANSFORMER))
        files = [name for name in files if name != _PROMPTS]
        config = self._json(files[0], dict) if files else {}
        fields = _Fields(self.found, files[0] if files else "", config)
        limit = fields.take("max_seq_length", None, lambda value: type(value) in (int, type(None)))
        if limit is not None and limit < 1:
            self.found.not_understood[f"{files[0]}: max_seq_length"] = f"is {limit!r}"
        self.given["max_tokens"] = min(limit or self._tokenizer_limit(), self.positions)
        self.given["lower_case"] = fields.take("do_lower_case", False, lambda value: type(value) is bool)
        fields.only("transformer_task", "feature-extraction")
        fields.only("module_output_name", "token_embeddings")
        fields.only(
            "modality_config", {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
        )
        fields.drop("unpad_inputs", "how a batch is computed, not what")
        fields.finish()

    def _tokenizer_limit(self) -> int:
        """What the tokenizer cuts texts to."""
        path = self.folder / "tokenizer_config.json"
        limit = self._json(path.name, dict).get("model_max_length") if path.is_file() else None
        return (
            int(limit) if isinstance(limit, (int, float)) and 0 < limit < self.positions else self.positions
        )

    def _pooling(self, path: str) -> None:
        name = f"{path}/config.json" if path else "config.json"
        config = dict(self._json(name, dict))
        fields = _Fields(self.found, name, config)
        flags = {key: config[key] for key in _MODE_FLAGS if key in config}
        active = [mode for key, mode in _MODE_FLAGS.items() if flags.get(key)]
        given = config.get("pooling_mode", (active or ["mean"]) if flags else "mean")
        modes = [given] if isinstance(given, str) else given
        where = f"{name}: pooling_mode"
        if not isinstance(modes, list) or not modes or not all(isinstance(mode, str) for mode in modes):
            self.found.not_understood[where] = f"is {given!r}"
        elif len(modes) > 1:
            self.found.not_understood[where] = (
                f"joins several poolings ({', '.join(modes)}); one alone is understood"
            )
        elif modes[0] not in _SUPPORTED_POOLING:
            self.found.not_understood[where] = (
                f"is {modes[0]!r}; understood are {', '.join(_SUPPORTED_POOLING)}"
            )
        else:
            self.given["pooling"] = modes[0]
            self.found.used[where] = modes[0]
        fields.seen |= {*flags, "pooling_mode"}
        for key in ("embedding_dimension", "word_embedding_dimension"):
            fields.only(key, self.width)
        self.given["include_prompt"] = fields.take("include_prompt", True, lambda value: type(value) is bool)
        fields.finish()

    def _dense(self, path: str) -> None:
        name = f"{path}/config.json"
        fields = _Fields(self.found, name, self._json(name, dict))
        sizes = [
            fields.take(key, None, lambda value: type(value) is int)
            for key in ("in_features", "out_features")
        ]
        bias = fields.take("bias", True, lambda value: type(value) is bool)
        activation = fields.take("activation_function", "torch.nn.modules.activation.Tanh", _is_torch_class)
        kind = _ACTIVATIONS.get(str(activation).rpartition(".")[2])
        if kind is None:
            self.found.not_understood[f"{name}: activation_function"] = (
                f"is {activation!r}; understood are {', '.join(_ACTIVATIONS)} of torch.nn"
            )
        for key in ("module_input_name", "module_output_name"):
            fields.only(key, _VECTOR, None)
        fields.only("use_residual", False)
        fields.finish()
        if sizes[0] != self.width:
            self.found.not_understood[f"{name}: in_features"] = (
                f"is {sizes[0]!r}, and what comes before has {self.width} channels"
            )
            return
        try:
            settings = DenseSettings(
                in_features=sizes[0], out_features=sizes[1], bias=bias, activation=kind or "identity"
            )
        except pydantic.ValidationError as error:
            self.found.not_understood[f"{name}: {error.errors()[0]['loc'][0]}"] = error.errors()[0]["msg"]
            return
        prefix = f"dense.{len(self.given['dense'])}"
        self.found.dense[prefix], self.found.layers[prefix] = self.folder / path, settings
        self.given["dense"].append(settings)
        self.width = settings.out_features

    def _normalize(self, path: str) -> None:
        name = f"{path}/config.json"
        if (self.folder / name).is_file():
            fields = _Fields(self.found, name, self._json(name, dict))
            for key in ("module_input_name", "module_output_name"):
                fields.only(key, _VECTOR, None)
            fields.finish()
        self.given["normalize"] = True

    def _dropout(self, path: str) -> None:
        self.found.used.pop(f"{MODULES}: {path or 'Dropout'}", None)
        self.found.without_effect[f"{MODULES}: {path or 'Dropout'}"] = "dropout acts in training only"

    def _read_texts(self) -> None:
        """Prompts, and what else describes the model as a whole."""
        config = self._json(_PROMPTS, dict) if (self.folder / _PROMPTS).is_file() else {}
        fields = _Fields(self.found, _PROMPTS, config)
        prompts = fields.take(
            "prompts",
            {},
            lambda value: (
                isinstance(value, dict)
                and all(isinstance(text, (str, type(None))) for text in value.values())
            ),
        )
        self.given["prompts"] = {name: text or "" for name, text in (prompts or {}).items()}
        self.given["default_prompt"] = fields.take(
            "default_prompt_name", None, lambda value: isinstance(value, (str, type(None)))
        )
        fields.only("model_type", "SentenceTransformer", None)
        fields.drop("similarity_fn_name", "how embeddings are compared, not what they are")
        fields.drop("__version__", _SAVED)
        fields.finish()

    def _json(self, name: str, kind: type) -> Any:
        try:
            contents = json.loads(read_regular(self.folder / name))
        except OSError as error:
            raise InputError(
                f"{self.reference}: {name}, which {MODULES} names, cannot be read ({error.strerror}); copy it from "
                "where the model is from."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.reference}: {name} cannot be read: it is no JSON.") from error
        if not isinstance(contents, kind):
            words = "list" if kind is list else "object"
            raise InputError(f"{self.reference}: {name} is no JSON {words}.")
        return contents


_KINDS: dict[str, Callable[[_Reader, str], None]] = {
    "Transformer": _Reader._transformer,
    "Pooling": _Reader._pooling,
    "Dense": _Reader._dense,
    "Normalize": _Reader._normalize,
    "Dropout": _Reader._dropout,
}


class _Fields:
    """The fields of one file, each to be accounted for."""

    def __init__(self, found: SentenceFiles, name: str, config: Mapping[str, Any]) -> None:
        self.found, self.name, self.config, self.seen = found, name, config, set[str]()

    def take(self, key: str, default: Any, holds: Callable[[Any], bool]) -> Any:
        """A field that is used; its default where it is missing or makes no sense."""
        self.seen.add(key)
        if key not in self.config:
            return default
        value = self.config[key]
        if not holds(value):
            self.found.not_understood[f"{self.name}: {key}"] = f"is {value!r:.120}"
            return default
        self.found.used[f"{self.name}: {key}"] = value
        return value

    def only(self, key: str, *expected: Any) -> None:
        """A field that is understood with these values alone."""
        self.seen.add(key)
        if key not in self.config:
            return
        if self.config[key] in expected:
            self.found.used[f"{self.name}: {key}"] = self.config[key]
        else:
            self.found.not_understood[f"{self.name}: {key}"] = (
                f"is {self.config[key]!r:.120}, and only {expected[0]!r} is understood"
            )

    def drop(self, key: str, why: str) -> None:
        """A field that changes no embedding."""
        self.seen.add(key)
        if key in self.config:
            self.found.without_effect[f"{self.name}: {key}"] = why

    def finish(self) -> None:
        """What is left over is not understood."""
        for key, value in self.config.items():
            if key not in self.seen and value is not None:
                self.found.not_understood[f"{self.name}: {key}"] = f"a field that is not known, {value!r:.80}"


def _is_torch_class(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("torch.nn.")
