"""README.md of an exported folder: YAML that a hub reads, and the page that people read.

Each format adds how its files are used; what is known of the model, and how it is told, is the same for all. Names and
licences are data of strangers: they are written as YAML by a library, and cannot become markup of the page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edkm_export._version import __version__
from edkm_export.escaping import for_markdown, for_yaml
from edkm_export.hub_id import is_hub_id
from edkm_export.yaml_text import load_yaml

if TYPE_CHECKING:  # importing it takes torch, which `push` does without
    from edkm_export.checkpoint import Checkpoint

__all__ = [
    "BEYOND",
    "FILE",
    "NOT_VERIFIED",
    "PASS",
    "FormatCard",
    "License",
    "base_models",
    "card_license",
    "card_verdict",
    "code",
    "license_of",
    "model_card",
    "table",
    "verdict_of",
    "with_verification",
]

FILE = "README.md"
"""Where a hub looks for the card."""

PASS, BEYOND, NOT_VERIFIED = "PASS", "BEYOND", "NOT VERIFIED"
"""What a card says of a verification: proved, faithful but beyond the limit of the quality, not run."""

_BEGIN = re.compile(r"<!-- edkm-export verification: (?P<verdict>[A-Z ]+) -->\n")
_END = "<!-- edkm-export verification: end -->"
_ADDRESS = re.compile(r"https://[\w.~:/?#@!$&'+,;=%-]+", re.ASCII)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class FormatCard:
    """What a format adds to the card.

    Attributes:
        library: name of the library that loads it, as hubs know it.
        tags: what a hub finds it by.
        summary: what it is, in words that begin a sentence: "A Core ML model for iOS18 and later".
        facts: {name: value} for the table, before those of the checkpoint.
        sections: {heading: Markdown}, after the verification.
    """

    library: str
    tags: Sequence[str]
    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class License:
    """A licence as the front matter of a card names it.

    Attributes:
        id: an identifier of the hub, or "other".
        name: of one that is "other".
        link: address of its text.
        said_by: the part of the source that names it.
    """

    id: str
    name: str = ""
    link: str = ""
    said_by: str = ""


def base_models(checkpoint: Checkpoint) -> list[str]:
    """Hub ids of what was palettized, as far as it is known; empty for a model of nobody's hub."""
    base = checkpoint.provenance.get("base_model")
    reference = base.get("reference") if isinstance(base, dict) else None
    if isinstance(reference, str) and is_hub_id(reference) and not Path(reference).exists():
        return [reference]
    recorded = _origin(checkpoint).get("base_models")
    ids = recorded.get("ids") if isinstance(recorded, dict) else None
    return (
        [each for each in ids if isinstance(each, str) and is_hub_id(each)] if isinstance(ids, list) else []
    )


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What was recorded of the source: with its account, or alone where its weights were not read."""
    found = checkpoint.provenance.get("source", checkpoint.provenance.get("origin"))
    return found if isinstance(found, dict) else {}


def license_of(checkpoint: Checkpoint) -> License | None:
    """The licence of what was palettized; None where its source names none."""
    found = _origin(checkpoint).get("license")
    if not isinstance(found, dict) or not isinstance(found.get("id"), str) or not found["id"]:
        return None
    name, link, said_by = (" ".join(str(found.get(key) or "").split()) for key in ("name", "link", "from"))
    link = link if _ADDRESS.fullmatch(link) else ""
    identifier = found["id"].lower()
    if _IDENTIFIER.fullmatch(identifier):
        return License(identifier, name if identifier == "other" else "", link, said_by)
    # such as "MIT OR Apache-2.0": what a hub takes for the name of another licence has no spaces
    return License("other", "-".join(re.findall(r"[a-z0-9.]+", identifier)) or "unnamed", link, said_by)


def model_card(checkpoint: Checkpoint, name: str, form: FormatCard, verdict: str, verification: str) -> str:
    """The whole text.

    Args:
        checkpoint: what was exported.
        name: of the model.
        form: what its format adds.
        verdict: of the verification, one or two words in capitals.
        verification: what it found, in Markdown.
    """
    bases, licence = base_models(checkpoint), license_of(checkpoint)
    made_from = " and ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    parts = [
        _front_matter(checkpoint, form, bases, licence),
        f"# {for_markdown(name)}",
        f"{form.summary}, made by edkm-export {__version__}" + (f" from {made_from}." if bases else "."),
        _license_words(licence, bases),
        table([("", ""), *form.facts.items(), *_facts(checkpoint).items()]),
        f"## Quality\n\n{_block(verdict, verification)}",
        *(f"## {heading}\n\n{text}" for heading, text in form.sections.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_verification(card: str, verdict: str, verification: str) -> str:
    """The card with what another verification found; one without the part gets it at its end."""
    begin = _BEGIN.search(card)
    end = -1 if begin is None else card.find(_END, begin.end())
    if begin is None or end < 0:
        return f"{card.rstrip()}\n\n## Quality\n\n{_block(verdict, verification)}\n"
    return card[: begin.start()] + _block(verdict, verification) + card[end + len(_END) :]


def card_verdict(card: str) -> str | None:
    """The verdict that a card tells; None where its verification is not one that we wrote."""
    found = _BEGIN.search(card)
    return None if found is None or _END not in card else found["verdict"]


def verdict_of(report: Mapping[str, Any]) -> str:
    """One word for a report.json of any version: PASS, BEYOND, or what it says instead; empty when it says nothing."""
    faithful = report.get("faithful_export", report.get("verdict"))
    if not isinstance(faithful, str):
        return ""
    return BEYOND if faithful == PASS and report.get("quality") == BEYOND else faithful


def card_license(card: str) -> str | None:
    """The licence in the front matter of a card; None without one."""
    lines = card.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return None
    try:
        front = load_yaml("\n".join(lines[1 : lines.index("---", 1)]))
    except ValueError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return str(found) if found else None


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first row is its head. Cells are Markdown without bars and new lines."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def code(language: str, lines: Sequence[str]) -> str:
    """A block of code, which no line of it can end."""
    longest = max((len(run) for line in lines for run in re.findall(r"`{3,}", line)), default=2)
    fence = "`" * (longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def _front_matter(
    checkpoint: Checkpoint, form: FormatCard, bases: Sequence[str], licence: License | None
) -> str:
    front: dict[str, Any] = {}
    if licence is not None:
        front["license"] = licence.id
        front |= {"license_name": licence.name} if licence.name else {}
        front |= {"license_link": licence.link} if licence.id == "other" and licence.link else {}
    if bases:
        front["base_model"] = bases[0] if len(bases) == 1 else list(bases)
        front["base_model_relation"] = "quantized"
    front |= {
        "library_name": form.library,
        "pipeline_tag": "text-generation" if checkpoint.embedding is None else "feature-extraction",
        "tags": [*form.tags, "palettization", "edkm-export"],
        "quantization": {
            "method": "palettization",
            "bits": sorted({tensor.n_bits for tensor in checkpoint.palettized.values()}),
            "bits_per_weight": round(checkpoint.bits_per_weight, 2),
        },
    }
    return f"---\n{for_yaml(front)}---"


def _license_words(licence: License | None, bases: Sequence[str]) -> str:
    if licence is None:
        where = f"the page of {bases[0]} may say it" if bases else "ask whoever made it"
        return (
            "The licence of the original is not known: its files name none. Before you share this model, find it "
            f"({where}) and write it as `license:` at the head of this file."
        )
    name = licence.name or licence.id
    words = f"Licence: {for_markdown(name)}" + (f" (<{licence.link}>)" if licence.link else "")
    said = f", as {for_markdown(licence.said_by)} says" if licence.said_by else ""
    return f"{words}{said}. It holds for this model, too."


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    recipe = checkpoint.recipe.get("name") if isinstance(checkpoint.recipe, dict) else None
    palettized = sum(tensor.numel for tensor in checkpoint.palettized.values())
    return {
        "parameters": f"{checkpoint.numel:,} ({palettized:,} palettized)",
        "recipe": for_markdown(str(recipe)) if recipe else "not recorded",
        "palettized": _how(checkpoint.provenance),
        "bits a weight": f"{checkpoint.bits_per_weight:.2f}, LUTs and unpalettized weights included",
    }


def _how(provenance: Mapping[str, Any]) -> str:
    """With training or without."""
    training, calibration = provenance.get("training"), provenance.get("calibration")
    if isinstance(training, dict):
        steps, tokens = (_whole(training.get(key)) for key in ("trained_steps", "trained_tokens"))
        return f"while it was fine-tuned for {steps} steps of {tokens} tokens in all"
    if isinstance(calibration, dict) and isinstance(provenance.get("compensation"), dict):
        weights, tokens = _whole(provenance["compensation"].get("weights")), _whole(calibration.get("tokens"))
        return f"in one shot, {weights} weights with their errors made up for on {tokens} tokens of a text"
    if isinstance(calibration, dict):
        return f"in one shot, weighted by the activations of {_whole(calibration.get('tokens'))} tokens of a text"
    return "in one shot, without a calibration text" if "source" in provenance else "not recorded"


def _whole(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "unknown"


def _block(verdict: str, verification: str) -> str:
    return f"<!-- edkm-export verification: {verdict} -->\n{verification.strip()}\n{_END}"
