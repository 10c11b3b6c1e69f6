"""Metadata taken key by key, so that none is left over unseen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_file import GgufFile

__all__ = ["GgufSettings"]

_REQUIRED: Any = object()

# Key, or beginning of one that ends in a dot, and why it changes no logit.
_WITHOUT_EFFECT = {
    "general.": "describes the file",
    "quantize.imatrix.": "describes how the file was quantized",
    "mradermacher.": "describes how the file was quantized",
}
# Keys of the first list that are looked at all the same.
_LOOKED_AT = ("general.architecture", "general.alignment", "general.type", "general.quantization_version")


class GgufSettings:
    """What became of each key. Keys of the architecture are named without its prefix.

    Attributes:
        arch: the architecture, such as "llama".
        used: {key: value} that decides something about the model.
        without_effect: {key: why it changes no logit}.
        not_understood: {key: what is missing to use it}.
    """

    def __init__(self, file: GgufFile) -> None:
        self.path, self._metadata = file.path, file.metadata
        self.used: dict[str, Any] = {}
        self.without_effect: dict[str, str] = {}
        self.not_understood: dict[str, str] = {}
        self.arch = ""
        self.arch = self.text("general.architecture")
        self._about_the_file(file)

    def _about_the_file(self, file: GgufFile) -> None:
        if "general.alignment" in self._metadata:
            self.used["general.alignment"] = self._metadata["general.alignment"]
        for key in ("split.no", "split.count", "split.tensors.count"):
            if key in self._metadata:
                self.used[key] = self._metadata[key]
        if self.used.get("split.no", 0) != 0:
            self.refuse("split.no", f"is {self.used['split.no']}, but this is the first part")
        kind = self.text("general.type", "model")
        if kind != "model":
            self.refuse("general.type", f"{kind!r} is not a model")
        version = self.integer("general.quantization_version", 2)
        quantized = any(tensor.kind not in ("F32", "F16", "BF16") for tensor in file.tensors.values())
        if version != 2 and quantized:
            self.refuse("general.quantization_version", f"{version} is not known, 2 is")

    def _name(self, key: str) -> str:
        return (
            key
            if key.startswith(("general.", "tokenizer.", "split.")) or not self.arch
            else f"{self.arch}.{key}"
        )

    def has(self, key: str) -> bool:
        """True when the file holds it."""
        return self._name(key) in self._metadata

    def refuse(self, key: str, why: str) -> None:
        """Note that the file's value cannot be used."""
        self.used.pop(self._name(key), None)
        self.not_understood[self._name(key)] = why

    def ignore(self, key: str, why: str) -> None:
        """Note that the file's value, if it has one, changes no logit."""
        name = self._name(key)
        if name in self._metadata:
            self.used.pop(name, None)
            self.without_effect[name] = why

    def _take(self, key: str, default: Any) -> Any:
        name = self._name(key)
        if name not in self._metadata:
            if default is _REQUIRED:
                raise SourceError(f"{self.path}: {name} is missing from its metadata.")
            return default
        self.used[name] = value = self._metadata[name]
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> SourceError:
        shown = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        return SourceError(f"{self.path}: {self._name(key)} is {shown}, expected {expected}.")

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 0) -> Any:
        """A whole number; a list of one value for each layer is taken when all are equal.

        Raises:
            SourceError: it is missing and has no default, or is none.
        """
        value = self._take(key, default)
        if value is default:
            return value
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if isinstance(value, list):
            raise self._wrong(key, value, "the same number for all layers")
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self._wrong(key, value, f"a whole number of at least {low}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number; of a float32 the shortest decimal that is rounded to it, such as 1e-05.

        Raises:
            SourceError: it is missing and has no default, or is none.
        """
        value = self._take(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        short = float(str(np.float32(value)))
        return short if np.float32(short) == value else float(value)

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number above zero.

        Raises:
            SourceError: it is missing and has no default, or is none.
        """
        value = self.number(key, default)
        if value is not default and value <= 0:
            raise self._wrong(key, value, "a number above zero")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or false.

        Raises:
            SourceError: it is missing and has no default, or is none.
        """
        value = self._take(key, default)
        if value is not default and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A text.

        Raises:
            SourceError: it is missing and has no default, or is none.
        """
        value = self._take(key, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def items(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A list of values of one type.

        Raises:
            SourceError: it is missing and has no default, or is none.
        """
        value = self._take(key, default)
        if value is not default and not (
            isinstance(value, list) and all(isinstance(each, kind) for each in value)
        ):
            raise self._wrong(key, value, f"a list of {kind.__name__} values")
        return value

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it is, whatever its type."""
        return self._take(key, default)

    def finish(self) -> None:
        """Sort what nobody took: known to be without effect, or not understood."""
        taken = self.used.keys() | self.without_effect.keys() | self.not_understood.keys()
        for key in self._metadata:
            if key in taken:
                continue
            reason = next(
                (
                    why
                    for known, why in _WITHOUT_EFFECT.items()
                    if key.startswith(known) and key not in _LOOKED_AT
                ),
                None,
            )
            if reason is None:
                self.not_understood[key] = f"is not known for models of architecture {self.arch}"
            else:
                self.without_effect[key] = reason
