"""YAML from outside: read by PyYAML's safe loader, within bounds.

An alias costs a few bytes and can stand for a thousand nodes, and a number of a million digits takes minutes. Recipes
and settings have some hundred nodes.
"""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["YamlError", "load_yaml"]

_MOST_CHARACTERS = 1 << 20
_MOST_NODES = 50_000  # with what aliases stand for
_MOST_DEPTH = 32
_MOST_DIGITS = 40


class YamlError(ValueError):
    """Text that is no YAML, or beyond the bounds; the message is one line."""


def load_yaml(text: str) -> Any:
    """Plain Python of a YAML text.

    Raises:
        YamlError: it is no YAML, of more than plain data, or too long, too deep, or with aliases that stand for
            too much.
    """
    if len(text) > _MOST_CHARACTERS:
        raise YamlError(f"{len(text):,} characters, more than {_MOST_CHARACTERS:,} are not read")
    loader = None
    try:
        loader = _Bounded(text)
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise YamlError(" ".join(str(error).split())[:300] or type(error).__name__) from error
    finally:
        if loader is not None:
            loader.dispose()


class _Bounded(yaml.SafeLoader):
    """Refuses while nodes are composed, before anything is made of them."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise YamlError(f"nested more than {_MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > _MOST_NODES:
            raise YamlError(f"its aliases stand for more than {_MOST_NODES:,} values")
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (yaml.YAMLError, YamlError, RecursionError):
            raise
        except Exception as error:  # what PyYAML falls over where a text is none of its tag's
            kind = node.tag.rpartition(":")[2]
            line = node.start_mark.line + 1
            why = f" ({error})" if isinstance(error, ValueError) else ""
            raise YamlError(f"line {line}: {str(node.value)[:40]!r} is no {kind}{why}") from error

    def construct_number(self, node: Any) -> Any:
        if len(node.value) > _MOST_DIGITS:
            raise YamlError(f"a number of {len(node.value):,} characters")
        kind = "int" if node.tag.endswith(":int") else "float"
        return getattr(self, f"construct_yaml_{kind}")(node)


for _kind in ("int", "float"):
    _Bounded.add_constructor(f"tag:yaml.org,2002:{_kind}", _Bounded.construct_number)


def _expanded(node: Any, known: dict[int, int | None]) -> int:
    """How many nodes there are when each alias is written out.

    Args:
        node: the uppermost.
        known: {id of a node: its count}, None while it is counted.
    """
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise YamlError("an alias that holds itself")
        return count
    known[id(node)] = None
    inner: list[Any] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    found = 1 + sum(_expanded(each, known) for each in inner)
    known[id(node)] = found
    return found
