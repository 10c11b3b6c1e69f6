"""Names, paths and texts of strangers, written so that they are nothing but text where they are put.

One function for each place: the terminal, Markdown, the YAML of a front matter, a string of Swift. HTML is escaped
by its templates. Each gives text that reads as its argument does, with escapes for what would mean something there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import yaml

__all__ = ["for_code_span", "for_markdown", "for_markdown_sentence", "for_swift", "for_terminal", "for_yaml"]

# Characters that move the cursor, change colours or titles, or turn the direction of writing: control characters but
# for line feed and tab, separators of lines, and format characters but for joiners of scripts and emoji.
_KEPT = "\n\t\u200c\u200d\ufeff\u00ad"
# As little as will do, since people read it as it is too: underlines inside of words are no markup, nor are backslashes
# before letters, or brackets that no address follows.
_MARKDOWN = re.compile(
    r"([`*|#~$]|\\(?=[!-/:-@\[-`{-~]|$)|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|(?<=\bwww)\.|\](?=[(\[:])|^\[)"
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ADDRESS = re.compile(r":(?=//)")
_LINE_START = re.compile(r"^([-+=:>]|\d+[.)])")
_CODE_SPAN = re.compile(r"(?<!`)(`[^`]+`)(?!`)")


def for_terminal(text: str) -> str:
    r"""For a terminal or a log: what it would act on is written as `\x1b`, `\u202e`; line feeds and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _KEPT or character.isprintable():
        return character
    kind = unicodedata.category(character)
    if kind not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character  # another kind of space, or not assigned yet
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def for_markdown(text: str) -> str:
    """For a line of Markdown, a heading or a cell of a table: one line that is no markup, link or HTML."""
    return _begun(_escaped(_one_line(text)))


def for_markdown_sentence(text: str) -> str:
    """As `for_markdown`, for a sentence of ours that names what strangers named: code in backticks stays code."""
    parts = _CODE_SPAN.split(_one_line(text))
    escaped = [part.replace("|", "\\|") if place % 2 else _escaped(part) for place, part in enumerate(parts)]
    return _begun("".join(escaped))


def _escaped(line: str) -> str:
    """Without markup, tags, and addresses that are links by themselves."""
    return _TAG.sub("&lt;", _ADDRESS.sub(r"\\:", _MARKDOWN.sub(r"\\\1", line)))


def _begun(line: str) -> str:
    r"""Without what would begin a list or underline a heading: `1\.` for `1.`, `\-` for `-`."""
    return _LINE_START.sub(lambda found: f"{found[1][:-1]}\\{found[1][-1]}", line)


def _one_line(text: str) -> str:
    return for_terminal(" ".join(text.split()))


def for_code_span(text: str) -> str:
    """For a span of code in Markdown, also in a cell of a table, with the backticks around it."""
    line = _one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if not line or line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def for_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as lines of YAML, such as a front matter, each text of it in quotes where it would mean something."""
    text = _dumped(values, allow_unicode=True)
    # PyYAML writes some line separators as they are, and reads them as spaces
    return text if for_terminal(text) == text else _dumped(values, allow_unicode=False)


def _dumped(values: Mapping[str, Any], *, allow_unicode: bool) -> str:
    return str(
        yaml.safe_dump(
            dict(values), sort_keys=False, allow_unicode=allow_unicode, default_flow_style=None, width=1000
        )
    )


def for_swift(text: str) -> str:
    """For the inside of a string literal of Swift, between its quotes."""
    return "".join(map(_swift, text))


def _swift(character: str) -> str:
    if character in ('"', "\\"):
        return f"\\{character}"  # a backslash could begin an interpolation, which is code
    if character.isprintable() or character in ("\u200c", "\u200d"):
        return character
    code = ord(character)
    return "\\u{fffd}" if 0xD800 <= code < 0xE000 else f"\\u{{{code:x}}}"
