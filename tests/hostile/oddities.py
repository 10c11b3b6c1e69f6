"""Values that no writer makes, and changes of bytes, files, JSON and YAML that put them where a reader looks."""

from __future__ import annotations

import copy
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["NUMBERS", "TEXTS", "change_bytes", "change_file", "change_json", "change_tree", "odd_value"]

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 5, 7, 16, 255, 65535, 10**6, 10**7, 10**8, 999_999_999, 2**31 - 1, 2**31, 2**32, 2**40, 2**62,
    2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", " ", "\0", "a\nb", "\x1b]0;owned\x07", "\x1b[2J\x1b[31m", "\x9b31m", "\u202etxt.exe", "\u2028", "\ud800",
    "[/red]", "[bold", "[link=https://example.org]here[/link]", ":warning:", "| a | b |", "# heading", "](x)[y](z)",
    "<script>alert(1)</script>", "`", "```\n", "<!-- -->", "---\nlicense: mit\n---", "*/ exit(1) /*", '"; exit(1) //',
    "\\(exit(1))", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "@model_path/../x", "C:\\x", "a" * 4096,
    "*" * 64, "{{ range(10**9) | list }}", "{% for a in range(99999999) %}x{% endfor %}", "(a+)+$", "%s%n", "None",
    "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "float16", "llama", "transformers.AutoModel",
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": ""}, [None], {"a": {"b": []}})


def odd_value(draw: random.Random) -> Any:
    """Any of them."""
    kind = draw.random()
    if kind < 0.45:
        return draw.choice(NUMBERS)
    if kind < 0.8:
        return draw.choice(TEXTS)
    return copy.deepcopy(draw.choice(_OTHERS))


def change_tree(draw: random.Random, tree: Any, odd: Callable[[random.Random], Any] = odd_value) -> str:
    """Change one place of nested lists and dicts; says which."""
    place, path = tree, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            if isinstance(place, dict):
                place["odd"] = odd(draw)
            else:
                place.append(odd(draw))
            return f"{path}: added"
        key = draw.choice(keys)
        path.append(key if isinstance(key, int) else str(key)[:40])
        inner = place[key]
        if isinstance(inner, dict | list) and draw.random() < 0.85:
            place = inner
            continue
        break
    how = draw.choice(("set", "set", "set", "set", "drop", "swap", "add", "nest", "scale"))
    if how == "drop":
        del place[key]
    elif how == "swap":
        other = draw.choice(keys)
        place[key], place[other] = place[other], place[key]
    elif how == "add" and isinstance(place, dict):
        place[draw.choice(TEXTS)] = inner
    elif how == "add":
        place.insert(
            key, copy.deepcopy(inner) if isinstance(inner, str | int | float | list | dict) else None
        )
    elif how == "nest":
        for _ in range(draw.choice((1, 3, 50))):
            inner = [inner]
        place[key] = inner
    elif how == "scale" and isinstance(inner, int | float) and not isinstance(inner, bool):
        place[key] = inner + 1 if draw.random() < 0.5 else inner * draw.choice((2, 3, 1000, -1))
    else:
        place[key] = odd(draw)
    return f"{path}: {how}"


def change_json(draw: random.Random, path: Path) -> str:
    """Change a file of JSON."""
    text = path.read_text(encoding="utf-8")
    kind = draw.random()
    if kind < 0.03:
        path.write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")
        return f"{path.name}: deep"
    if kind < 0.06:
        path.write_text('{"a": ' + "9" * 100_000 + "}", encoding="utf-8")
        return f"{path.name}: a number of 100,000 digits"
    if kind < 0.12:
        return change_bytes(draw, path)
    tree = json.loads(text)
    if not isinstance(tree, dict | list):
        return change_bytes(draw, path)
    words = [change_tree(draw, tree) for _ in range(draw.choice((1, 1, 1, 2)))]
    path.write_text(json.dumps(tree), encoding="utf-8")
    return f"{path.name}: {'; '.join(words)}"


def change_bytes(draw: random.Random, path: Path, head: int | None = None) -> str:
    """Change some bytes of a file, or its length; `head`: near its beginning."""
    data = bytearray(path.read_bytes())
    size = len(data) if head is None or draw.random() < 0.2 else min(head, len(data))
    if not size:
        path.write_bytes(os.urandom(0) + b"\xff" * 16)
        return f"{path.name}: was empty"
    place = draw.randrange(size)
    how = draw.choice(
        ("flip", "flip", "byte", "number", "number", "cut", "zeros", "insert", "repeat", "drop")
    )
    if how == "flip":
        data[place] ^= 1 << draw.randrange(8)
    elif how == "byte":
        data[place] = draw.randrange(256)
    elif how == "number":
        width = draw.choice((2, 4, 8))
        value = int(draw.choice([each for each in NUMBERS if isinstance(each, int)])) % (1 << 8 * width)
        place -= place % draw.choice((1, 4, 8))
        data[place : place + width] = value.to_bytes(width, "little")
    elif how == "cut":
        del data[place:]
    elif how == "zeros":
        data[place : place + 64] = bytes(64)
    elif how == "insert":
        data[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 64))))
    elif how == "repeat":
        data[place:place] = data[place : place + 256]
    else:
        del data[place : place + draw.choice((1, 8, 64))]
    path.write_bytes(data)
    return f"{path.name}: {how} at {place}"


def change_file(draw: random.Random, path: Path) -> str:
    """Put something else where a file was."""
    how = draw.choice(
        ("gone", "empty", "folder", "fifo", "loop", "device", "random", "sparse", "text", "closed")
    )
    path.unlink()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "random":
        path.symlink_to("/dev/urandom")
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(draw.choice((1 << 32, 1 << 40)))
    elif how == "text":
        path.write_text("this is not it\n" * 100, encoding="utf-8")
    elif how == "closed":
        path.write_bytes(b"{}")
        path.chmod(stat.S_IWUSR)
    return f"{path.name}: {how}"
