"""Changes inside a file of `torch.save`: its objects, its pickle, its zip archive."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.hostile.oddities import NUMBERS, TEXTS, change_bytes, odd_value

__all__ = ["CANARY", "change_archive", "change_objects", "odd_tensor", "rewrite"]

CANARY = "canary"
"""A file that hostile pickles make in the working folder, should they be run."""


class _Touch:
    """Unpickling an instance creates a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.open, (CANARY, os.O_CREAT | os.O_WRONLY)


class _Evaluate:
    """Likewise, through the interpreter."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return eval, (f"open({CANARY!r}, 'w').close()",)


def odd_tensor(draw: random.Random, like: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor that no writer stores, or one like another but for dtype, shape or a value."""
    makers: list[Callable[[], torch.Tensor]] = [
        lambda: torch.empty(3, 4, device="meta"),
        lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (10**5, 10**5)),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.ones(1).expand(10**6, 10**3),
        lambda: torch.ones(1, dtype=torch.uint8).expand(10**9),
        lambda: torch.ones(4, 4).to(torch.float8_e4m3fn),
        lambda: torch.empty(0),
        lambda: torch.empty(0, 5),
        lambda: torch.empty(4, 0),
        lambda: torch.tensor(float("nan")),
        lambda: torch.full((2, 2), float("inf")).half(),
        lambda: torch.ones(4, 4).t(),
        lambda: torch.ones(4, dtype=torch.complex64),
        lambda: torch.ones(4, dtype=torch.bool),
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        lambda: torch.tensor([2**63 - 1]),
        lambda: torch.ones(4, 4, requires_grad=True),
    ]
    if like is not None and like.numel() and like.layout == torch.strided and like.device.type == "cpu":
        plain = like.detach()
        makers += [
            lambda: plain.to(draw.choice((torch.float64, torch.int32, torch.uint8, torch.bfloat16))),
            lambda: plain.reshape(-1),
            lambda: plain.reshape(-1)[:-1] if plain.ndim == 0 else plain[:-1],
            lambda: plain[None],
            lambda: torch.zeros_like(plain),
            lambda: _with(draw, plain),
            lambda: _with(draw, plain),
            lambda: _with(draw, plain),
        ]
    return draw.choice(makers)()


def _with(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """With another value in one place."""
    changed = tensor.clone().contiguous()
    flat = changed.view(-1)
    place = draw.randrange(len(flat))
    if changed.is_floating_point():
        flat[place] = draw.choice((float("nan"), float("inf"), 0.0, 1.0, -float(flat[place]), 1e4))
    else:
        flat[place] = int(flat[place]) ^ 1
    return changed


def change_objects(draw: random.Random, tree: Any) -> str:
    """Change one place of nested lists, dicts and tensors."""
    place, path = tree, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return f"{path}: empty"
        key = draw.choice(keys)
        path.append(str(key)[:40])
        inner = place[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.9:
            place = inner
            continue
        break
    how = draw.choice(("set", "set", "set", "drop", "swap", "name", "object"))
    if how == "drop":
        del place[key]
    elif how == "swap":
        other = draw.choice(keys)
        place[key], place[other] = place[other], place[key]
    elif how == "name" and isinstance(place, dict):
        place[draw.choice((*TEXTS, *NUMBERS, None, ("a", "b"), b"x"))] = place.pop(key)
    elif how == "object":
        place[key] = draw.choice((_Touch, _Evaluate))()
    elif isinstance(inner, torch.Tensor) or draw.random() < 0.2:
        place[key] = odd_tensor(draw, inner if isinstance(inner, torch.Tensor) else None)
    else:
        place[key] = odd_value(draw)
    return f"{path}: {how}"


def change_archive(draw: random.Random, path: Path, mend: Callable[[Any], None] | None = None) -> str:
    """Change a file of `torch.save`.

    Args:
        draw: decides.
        path: of the file.
        mend: brings checksums inside of the objects up to date, half of the time.
    """
    kind = draw.random()
    if kind < 0.2:
        return change_bytes(draw, path, 65536)
    if kind < 0.7:
        contents = torch.load(path, weights_only=True)
        words = [change_objects(draw, contents) for _ in range(draw.choice((1, 1, 2)))]
        if mend is not None and draw.random() < 0.6:
            try:
                mend(contents)
                words.append("mended")
            except Exception:
                words.append("not mended")
        try:
            torch.save(contents, path)
        except Exception:  # some oddities cannot be saved
            path.write_bytes(pickle.dumps({"format": "edkm-export"}))
        return "; ".join(words)
    return _change_zip(draw, path)


def _change_zip(draw: random.Random, path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    how = draw.choice(
        ("pickle", "pickle", "deflate", "bomb", "huge", "lost", "twice", "names", "short", "deep", "many")
    )
    method = zipfile.ZIP_STORED
    pickled = next(place for place, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    name, data = entries[pickled]
    if how == "pickle":
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 4))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        entries[pickled] = (name, bytes(changed))
    elif how == "deflate":
        method = zipfile.ZIP_DEFLATED
    elif how == "bomb":  # 300 MB of text that take 300 kB
        method = zipfile.ZIP_DEFLATED
        stream = io.BytesIO()
        pickle.Pickler(stream, 2).dump({"format": "a" * (300 << 20)})
        entries[pickled] = (name, stream.getvalue())
    elif how == "huge":  # many small objects take a hundred times their bytes
        entries[pickled] = (name, b"\x80\x02](" + b"}" * (20 << 20) + b"e.")
    elif how == "lost":
        entries.pop(draw.randrange(len(entries)))
    elif how == "twice":
        entries.append(draw.choice(entries))
    elif how == "names":
        place = draw.randrange(len(entries))
        entries[place] = (draw.choice(("../x", "/etc/x", "a" * 60000, "a\0b", "é")), entries[place][1])
    elif how == "short":
        place = draw.randrange(len(entries))
        entries[place] = (entries[place][0], entries[place][1][:-1])
    elif how == "deep":
        entries[pickled] = (name, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    else:
        entries[pickled] = (name, b"\x80\x02" + b"}q\x00" + b"2" * (5 << 20) + b".")
    with zipfile.ZipFile(path, "w", method) as archive:
        for each, content in entries:
            archive.writestr(each, content)
    return f"zip: {how}"


def rewrite(path: Path, pickled: bytes | None = None, method: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again, with another pickle or compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, pickled if pickled is not None and name.endswith("data.pkl") else content)
