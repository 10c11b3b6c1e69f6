"""Numbers of a model's configuration, held against its weights before a library builds anything of them.

A configuration is a few lines of text from a stranger: ten million layers, or names for a hundred million labels, are
built for hours although no weights of them are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edkm_export.errors import EdkmExportError, InputError

__all__ = ["check_config"]

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LAYER_OF = re.compile(r"(?:^|\.)(?:layers|h|blk|blocks?)\.(\d{1,9})\.")
_MOST_LAYERS = 4096  # where there are no weights to count
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_MOST_POSITIONS = 1 << 25  # the longest context that a model claims has ten million
_MOST_LABELS = 1 << 16  # each becomes a text; language models have none
_SIZE = re.compile(r"(?:^|_)(?:size|dim|heads?|embd|inner|width|rank|experts?|channels?|layers?)(?:_|$)")
_MOST_SIZE = 1 << 20
_MOST_NUMBER = 1 << 62
_MOST_DEPTH = 16
_MOST_ENTRIES = 1 << 20


def check_config(
    config: Mapping[str, Any],
    where: str,
    shapes: Mapping[str, Sequence[int]] | None = None,
    error: type[EdkmExportError] = InputError,
) -> None:
    """Refuse a configuration with numbers that its weights cannot bear out.

    Args:
        config: of transformers, as JSON holds it.
        where: what it belongs to, for messages.
        shapes: {name: shape} of the weights that are there; None: not known yet.
        error: what is raised.

    Raises:
        InputError: or `error`, naming the setting, its value, and what was expected.
    """
    for key, value in _entries(config, where, error):
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if isinstance(value, int) and abs(value) > _MOST_NUMBER:
            digits = int(value.bit_length() * math.log10(2)) + 1  # to write it out may take hours
            raise error(f"{where}: {key} is a number of {digits:,} digits; no setting is.")
        name = key.rpartition(".")[2]
        if name in _LAYERS:
            _check_layers(name, value, where, shapes, error)
        elif name in _POSITIONS and value > _MOST_POSITIONS:
            raise error(
                f"{where}: {name} is {value:,}; no model has more than {_MOST_POSITIONS:,} positions."
            )
        elif name == "num_labels" and value > _MOST_LABELS:
            raise error(f"{where}: num_labels is {value:,}; a language model has none. Leave it out.")
        elif _SIZE.search(name) and value > _MOST_SIZE:
            largest = max((max(shape, default=0) for shape in (shapes or {}).values()), default=0)
            if value > largest:
                found = f", and its largest weight is {largest:,} long" if shapes else ""
                raise error(f"{where}: {name} is {value:,}, which no model has{found}.")
    for key in ("id2label", "label2id"):
        if isinstance(config.get(key), Mapping) and len(config[key]) > _MOST_LABELS:
            raise error(f"{where}: {key} has {len(config[key]):,} labels; a language model has none.")


def _check_layers(
    name: str,
    value: float,
    where: str,
    shapes: Mapping[str, Sequence[int]] | None,
    error: type[EdkmExportError],
) -> None:
    held = {int(found[1]) for weight in shapes or {} if (found := _LAYER_OF.search(weight))}
    most = max(held) + 1 if held else _MOST_LAYERS
    if value > most:
        there = f"its weights are of {most:,}" if held else f"no model has more than {most:,}"
        raise error(f"{where}: {name} is {value:,} layers, but {there}.")


def _entries(value: Any, where: str, error: type[EdkmExportError]) -> Iterator[tuple[str, Any]]:
    """All settings, those of nested ones with their path; without recursion, since depth is the stranger's."""
    stack: list[tuple[str, Any, int]] = [("", value, 0)]
    seen = 0
    while stack:
        path, held, depth = stack.pop()
        seen += 1
        if depth > _MOST_DEPTH or seen > _MOST_ENTRIES:
            raise error(f"{where}: its configuration is nested too deeply, or has too many entries.")
        if isinstance(held, Mapping):
            stack += [(f"{path}.{key}" if path else str(key), each, depth + 1) for key, each in held.items()]
        elif isinstance(held, list | tuple):
            stack += [(path, each, depth + 1) for each in held]
        else:
            yield path, held
