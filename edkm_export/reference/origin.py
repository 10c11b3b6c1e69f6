"""What a source says of where it is from: its licence, and the hub id of the model.

Nothing here decides what is computed. The values go into the provenance of a checkpoint and from there into model
cards; they are data of strangers, so anything but short plain text is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edkm_export.hub_id import hub_id_of_url, is_hub_id
from edkm_export.regular_file import open_regular
from edkm_export.yaml_text import load_yaml

__all__ = ["Origin", "folder_origin", "gguf_origin"]

_MOST_BYTES = 1 << 20
_LONGEST = 200
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # folder of a model in the hub's cache
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
# Words of the title of a licence, and what the hub calls it. A text of another title is not guessed at.
_TITLES = {
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "the mit license (mit)": "mit",
    "bsd 3-clause license": "bsd-3-clause",
    "bsd 2-clause license": "bsd-2-clause",
    "gnu general public license version 3": "gpl-3.0",
    "mozilla public license version 2.0": "mpl-2.0",
    "gemma terms of use": "gemma",
    "llama 2 community license agreement": "llama2",
    "meta llama 3 community license agreement": "llama3",
    "llama 3.1 community license agreement": "llama3.1",
    "llama 3.2 community license agreement": "llama3.2",
    "llama 3.3 community license agreement": "llama3.3",
}


@dataclass(frozen=True)
class Origin:
    """Where a model is from, as its source says.

    Attributes:
        license: what the source calls its licence, "other" for one that it only names; empty: it names none.
        license_name: name of a licence that is "other".
        license_link: address of its text.
        license_from: which part of the source says it.
        base_models: hub ids of the model itself, or of those it was made from.
        base_from: which part of the source says it.
    """

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    license_from: str = ""
    base_models: tuple[str, ...] = ()
    base_from: str = ""

    def provenance(self) -> dict[str, Any]:
        """What is known, for a checkpoint: plain Python."""
        found: dict[str, Any] = {}
        if self.license:
            parts = {"id": self.license, "name": self.license_name, "link": self.license_link}
            found["license"] = {name: value for name, value in parts.items() if value} | {
                "from": self.license_from
            }
        if self.base_models:
            found["base_models"] = {"ids": list(self.base_models), "from": self.base_from}
        return found


def folder_origin(folder: Path, config: Mapping[str, Any]) -> Origin:
    """Of a Hugging Face folder: its model card and LICENSE, its place in the hub's cache, its configuration.

    Args:
        folder: with config.json.
        config: what that holds.
    """
    card = _front_matter(folder / "README.md")
    bases, base_from = _folder_bases(folder, config, card)
    name, title, link = _plain(card.get("license")), _plain(card.get("license_name")), ""
    said_by = "its model card"
    if name:
        link = _absolute(_plain(card.get("license_link")), bases)
    elif found := _license_file(folder):
        name, title, said_by = found
        link = _absolute(said_by, bases)
    return Origin(name, title, link, said_by if name else "", bases, base_from)


def gguf_origin(metadata: Mapping[str, Any]) -> Origin:
    """Of a GGUF file: general.license, and the source or base models that its metadata names."""
    bases: tuple[str, ...] = ()
    key = ""
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url"):
        text = _plain(metadata.get(key))
        known = text if is_hub_id(text) else hub_id_of_url(text)
        if known:
            bases = (known,)
            break
    else:
        key = "general.base_model"
        urls = (
            _plain(metadata.get(f"{key}.{number}.repo_url"))
            for number in range(_count(metadata.get(f"{key}.count")))
        )
        bases = tuple(dict.fromkeys(known for url in urls if (known := hub_id_of_url(url))))
    name = _plain(metadata.get("general.license"))
    link = _plain(metadata.get("general.license.link"))
    return Origin(
        name,
        _plain(metadata.get("general.license.name")),
        link if link.startswith("https://") else "",
        "general.license of the GGUF file" if name else "",
        bases,
        f"{key} of the GGUF file" if bases else "",
    )


def _folder_bases(
    folder: Path, config: Mapping[str, Any], card: Mapping[str, Any]
) -> tuple[tuple[str, ...], str]:
    if folder.parent.name == "snapshots" and (cached := _CACHED.fullmatch(folder.parent.parent.name)):
        known = f"{cached['owner']}/{cached['name']}"
        if is_hub_id(known):
            return (known,), "the hub"
    text = _plain(config.get("_name_or_path"))
    if is_hub_id(text):
        return (text,), "_name_or_path of config.json"
    given = card.get("base_model")
    named = [_plain(each) for each in (given if isinstance(given, list) else [given])]
    bases = tuple(dict.fromkeys(each for each in named if is_hub_id(each)))
    return bases, "base_model of its model card" if bases else ""


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty without one, or when it cannot be read."""
    head, _, rest = _text(path).lstrip("\ufeff").partition("\n")
    if head.strip() != "---":
        return {}
    lines: list[str] = []
    for line in rest.splitlines():
        if line.strip() == "---":
            break
        lines.append(line)
    else:
        return {}
    try:
        found = load_yaml("\n".join(lines))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _license_file(folder: Path) -> tuple[str, str, str] | None:
    """Hub name of the licence, its title where it has no such name, and the name of the file."""
    for name in _LICENSE_FILES:
        lines = [line.strip(" \t#*=-") for line in _text(folder / name).splitlines()]
        lines = [line for line in lines if line][:3]
        if not lines:
            continue
        for words in (lines[0], " ".join(lines[:2]), " ".join(lines)):
            title = " ".join(re.sub(r"[,.](?=\s|$)", " ", words.lower()).split())
            for known, identifier in _TITLES.items():
                if title == known or title.startswith(f"{known} "):
                    return identifier, "", name
        return "other", _plain(lines[0]), name
    return None


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _plain(value: Any) -> str:
    """A short text in one line; a list of such is joined. Empty for anything else."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = " AND ".join(value)
    if not isinstance(value, str):
        return ""
    text = " ".join(value.split())
    return text if text.isprintable() and len(text) <= _LONGEST else ""


def _absolute(link: str, bases: tuple[str, ...]) -> str:
    """Address of a licence; one beside the model card is looked up where that is, if this is known."""
    if link.startswith("https://"):
        return link
    if link and len(bases) == 1 and re.fullmatch(r"[\w][\w.-]*", link):
        return f"https://huggingface.co/{bases[0]}/blob/main/{link}"
    return ""


def _count(value: Any) -> int:
    return min(value, 16) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
