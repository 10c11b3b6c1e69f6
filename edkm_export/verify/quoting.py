"""Texts of models in messages and reports: what cannot be seen is written out."""

from __future__ import annotations

__all__ = ["quoted"]


def quoted(text: str) -> str:
    """A text of a model in double quotes, with escapes for what cannot be seen: spaces at its ends are then visible."""
    marks = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    seen = (marks.get(one) or (one if one.isprintable() else f"\\u{ord(one):04x}") for one in text)
    return f'"{"".join(seen)}"'
