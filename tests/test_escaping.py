"""What strangers named is nothing but text, wherever it is put: held against parsers that are not ours."""

from __future__ import annotations

import re
import unicodedata

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from edkm_export.escaping import (
    for_code_span,
    for_markdown,
    for_markdown_sentence,
    for_swift,
    for_terminal,
    for_yaml,
)

TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
MARKUP = st.text("[](){}<>`*_~#|!\\-+=.:0123456789&;$@ \n\taAbB/htps\"'", max_size=40)
HOSTILE = (
    "[/red]", "[link=https://example.org]x[/link]", "\x1b]0;owned\x07", "\x9b31m", "\u202etxt.exe", "\ud800", "a\r\nb",
    "| a | b |", "# heading", "1. one", "- one", "+ one", "===", "---", "<script>alert(1)</script>", "<!-- x", "`x",
    "``x`", "![x](y)", "[x](javascript:y)", "https://example.org", "www.example.org", "&lt;b&gt;", "**x**", "_x_",
    "a_b", "[a]: b", "[[a]](b)", "a](b", "]", "[", "<a", "<https://x.y>",
    "~~x~~", "\\", "\\(exit(1))", '"', "x\\", "x`", "$x$", "    code", "> quote", "a  \nb", "", " ",
)  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def for_all(test):
    """Any text, texts of markup, and the hostile ones one by one."""
    for text in HOSTILE:
        test = example(text)(test)
    return settings(max_examples=150, deadline=None)(given(st.one_of(TEXT, MARKUP))(test))


def seen(text: str) -> str:
    """What a reader is to see of it in one line."""
    return for_terminal(" ".join(text.split()))


@for_all
def test_a_terminal_acts_on_nothing(text: str) -> None:
    shown = for_terminal(text)
    for character in shown:
        assert character in "\n\t\u200c\u200d\ufeff\u00ad" or unicodedata.category(character) not in (
            "Cc", "Cf", "Cs", "Zl", "Zp",
        )  # fmt: skip
    shown.encode()
    if text.isascii() and text.isprintable():
        assert shown == text


def inline(markdown: str) -> list:
    """Tokens of a text that is one paragraph."""
    tokens = PARSER.parse(markdown)
    kinds = [token.type for token in tokens]
    assert kinds in ([], ["paragraph_open", "inline", "paragraph_close"]), kinds
    return list(tokens[1].children) if tokens else []


@for_all
def test_markdown_is_text(text: str) -> None:
    tokens = inline(for_markdown(text))
    assert {token.type for token in tokens} <= {"text", "text_special"}
    assert "".join(token.content for token in tokens) == seen(text)
    assert not re.search(r"(?<!\\)://", for_markdown(text)) and not re.search(r"\bwww\.", for_markdown(text))


@for_all
def test_a_heading_and_a_cell_of_a_table_hold_it_whole(text: str) -> None:
    escaped = for_markdown(text)
    heading = PARSER.parse(f"# x{escaped}")
    assert [token.type for token in heading] == ["heading_open", "inline", "heading_close"]
    table = PARSER.parse(f"| a | b |\n|---|---|\n| x{escaped}x | y |\n")
    cells = [token for token in table if token.type == "inline"]
    assert len(cells) == 4
    assert "".join(token.content for token in cells[2].children) == f"x{seen(text)}x"


@for_all
def test_a_sentence_keeps_nothing_but_code(text: str) -> None:
    tokens = inline(for_markdown_sentence(text))
    assert {token.type for token in tokens} <= {"text", "text_special", "code_inline"}


def test_code_of_ours_stays_code() -> None:
    tokens = inline(for_markdown_sentence("run `edkm-export verify a_b` for <x>"))
    assert [token.content for token in tokens if token.type == "code_inline"] == ["edkm-export verify a_b"]
    assert "".join(token.content for token in tokens if token.type != "code_inline") == "run  for <x>"


def test_names_of_weights_are_not_littered_with_escapes() -> None:
    name = "model.layers.0.self_attn.q_proj.weight (4 bits)"
    assert for_markdown(name) == for_markdown_sentence(name) == name


@for_all
def test_a_code_span_holds_it_whole(text: str) -> None:
    tokens = inline(f"a {for_code_span(text)} b")
    if seen(text):
        (code,) = (token for token in tokens if token.type == "code_inline")
        assert code.content.strip() == seen(text).replace("|", "\\|").strip()
    assert {token.type for token in tokens} <= {"text", "text_special", "code_inline"}


@for_all
def test_yaml_gives_it_back(text: str) -> None:
    written = for_yaml({"name": text, "others": [text, "x"]})
    written.encode()
    assert "\n---" not in f"\n{written}" and "\n..." not in f"\n{written}"
    assert yaml.safe_load(written) == {"name": text, "others": [text, "x"]}


SWIFT = re.compile(r'(?P<plain>[^"\\\x00-\x1f\x7f])|\\u\{(?P<code>[0-9a-f]{1,6})\}|\\(?P<mark>["\\])')


@for_all
def test_a_string_of_swift_gives_it_back(text: str) -> None:
    """By the grammar of The Swift Programming Language, Lexical Structure, String Literals."""
    literal, found, place = for_swift(text), [], 0
    while place < len(literal):
        match = SWIFT.match(literal, place)
        assert match, literal[place:]
        found.append(
            match["plain"] or match["mark"] or (chr(int(match["code"], 16)) if match["code"] else "")
        )
        place = match.end()
    assert "".join(found) == re.sub("[\ud800-\udfff]", "\ufffd", text)
    literal.encode()
