"""What transformers' own code of a model type takes from a config.json.

Fields that a configuration class declares are in its signature. Those of older files that it converts, and fields of
the rotary settings that only one model reads, are nowhere but in its source: they are looked up there, so that no list
here has to follow it.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["ConfigClass", "config_class"]

_FROM_ARGUMENTS = re.compile(r"""kwargs\.(?:pop|get|setdefault)\(\s*["'](\w+)["']""")
_TO_ARGUMENTS = re.compile(r"""kwargs\[\s*["'](\w+)["']\s*\]\s*=""")
_FROM_ROTARY = re.compile(r"""rope_parameters(?:\.get\(|\[)\s*["'](\w+)["']""")


class ConfigClass:
    """The configuration class of a model type.

    Args:
        kind: the class.

    Attributes:
        declared: fields in its signature, and other names for them.
        converted: fields that it takes beyond those.
        rotary: fields of `rope_parameters` that the model itself reads, whatever the kind of scaling.
        rotary_notes: fields of `rope_parameters` that may be there, and that only the model's documentation knows.
    """

    def __init__(self, kind: Any) -> None:
        self.declared = {each.name for each in fields(kind)} | set(kind.attribute_map)
        own = [inspect.getsource(each) for each in kind.__mro__ if ".models." in each.__module__]
        self.converted = {name for source in own for name in _FROM_ARGUMENTS.findall(source)}
        self.converted |= {name for source in own for name in _TO_ARGUMENTS.findall(source)}
        self.converted |= {f"_{name}" for name in self.converted}  # as some classes save them
        model = Path(inspect.getfile(kind)).with_name(f"modeling_{Path(inspect.getfile(kind)).stem[14:]}.py")
        source = model.read_text(encoding="utf-8") if model.is_file() else ""
        self.rotary = set(_FROM_ROTARY.findall(source))
        self.rotary_notes = set(kind.ignore_keys_at_rope_validation) - self.rotary

    @property
    def layers_differ(self) -> bool:
        """It makes settings of single layers itself, and saves them in `per_layer_config`."""
        return "per_layer_config" in self.converted

    @property
    def rotates(self) -> bool:
        """Positions are rotary ones."""
        return "rope_parameters" in self.declared

    @property
    def rotates_in_part(self) -> bool:
        """A part of each head may rotate."""
        return "partial_rotary_factor" in self.rotary


@cache
def config_class(family: str) -> ConfigClass | None:
    """The one that transformers has for a model type; None: it knows no such type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return ConfigClass(CONFIG_MAPPING[family]) if family in CONFIG_MAPPING else None
