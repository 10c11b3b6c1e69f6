"""The text model in a folder of a model that also sees or hears: its configuration, and the names of its tensors.

Without images and sound such a model computes what its text model does, so the rest of the folder changes no logit of a
text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edkm_export.reference.config_class import config_class
from edkm_export.reference.stored_tensors import StoredTensors

__all__ = ["TextPart", "text_of"]

_TEXT_TYPES: dict[str, dict[str, str]] = {
    "gemma3": {"gemma3_text": "gemma3_text"},
    "gemma3n": {"gemma3n_text": "gemma3n_text"},
    "gemma4": {"gemma4_text": "gemma4_text"},
    "mistral3": {"mistral": "mistral", "ministral3": "ministral3"},
    # its rotation has three axes, which are the same number in a text
    "qwen3_vl": {"qwen3_vl_text": "qwen3"},
}
"""{model type of a folder: {that of its text part: the text model that computes the same}}."""

_OTHER_PART = "of the vision part; a text has no images"
_SOUND = "of the audio part; a text has no sound"
_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
_OTHER_PREFIXES = (
    *("vision_tower.", "vision_model.", "visual.", "multi_modal_projector."),
    *("model.vision_tower.", "model.visual.", "model.multi_modal_projector.", "model.embed_vision."),
)
_SOUND_PREFIXES = ("model.audio_tower.", "model.embed_audio.")
_OWN = ("text_config", "model_type", "architectures")
_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # said for the whole model
_AXES = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class TextPart:
    """What a config.json says of a text model.

    Attributes:
        config: of the text model, as its own config.json would say it.
        without_effect: {field of the whole: why}.
        renamed: tensors have the names that they have in the whole.
    """

    config: dict[str, Any]
    without_effect: dict[str, str] = field(default_factory=dict)
    renamed: bool = False

    def tensors(self, stored: StoredTensors) -> StoredTensors:
        """Those of the text model, by its own names; the others are without effect."""
        if not self.renamed:
            return stored
        kept, left = {}, dict(stored.without_effect)
        for name, tensor in stored.tensors.items():
            if name.startswith(_OTHER_PREFIXES):
                left[name] = _OTHER_PART
            elif name.startswith(_SOUND_PREFIXES):
                left[name] = _SOUND
            else:
                kept[_text_name(name)] = tensor
        return dataclasses.replace(stored, tensors=kept, without_effect=left)


def text_of(config: Mapping[str, Any]) -> TextPart:
    """The text part of a config.json; the whole where it describes nothing but a text model, or one that is unknown."""
    known = _TEXT_TYPES.get(str(config.get("model_type")))
    inner = config.get("text_config")
    if known is None or not isinstance(inner, dict) or "quantization_config" in config:
        return TextPart(dict(config))
    kind = known.get(str(inner.get("model_type")))
    outer = config_class(str(config["model_type"]))
    if kind is None or outer is None:
        return TextPart(dict(config))
    left, made = {}, {**inner, "model_type": kind}
    made.pop("architectures", None)
    for name, value in config.items():
        if name in _SHARED:
            if value is not None:
                made[name] = value
        elif name in outer.declared | outer.converted and name not in _OWN:
            left[name] = _SOUND if name.startswith(("audio", "boa_", "eoa_")) else _OTHER_PART
        elif name not in _OWN:
            made.setdefault(name, value)
    for name in ("rope_parameters", "rope_scaling"):
        if kind == "qwen3" and isinstance(made.get(name), dict):
            made[name] = {key: value for key, value in made[name].items() if key not in _AXES}
    return TextPart(made, left, renamed=True)


def _text_name(name: str) -> str:
    for prefix, own in _PREFIXES:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name
