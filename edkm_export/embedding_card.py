"""What the model card of an embedding model says, whatever the format."""

from __future__ import annotations

from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.escaping import for_markdown
from edkm_export.model_card import table

__all__ = ["MARKED_PROMPTS", "prompts_section"]

MARKED_PROMPTS = " Prompts are not pooled: give their tokens a 2 in `attention_mask`, those of the text a 1."


def prompts_section(settings: EmbeddingSettings) -> dict[str, str]:
    """A section of the card about prompts; empty where the model has none."""
    given = {name: prompt for name, prompt in settings.prompts.items() if prompt}
    if not given:
        return {}
    rows = [
        ("name", "put before the text"),
        *((for_markdown(name), f"`{_one_line(text)}`") for name, text in given.items()),
    ]
    usual = settings.default_prompt
    default = "" if usual is None else f"\n\nUsed where none is named: {for_markdown(usual)}."
    return {"Prompts": table(rows) + default}


def _one_line(text: str) -> str:
    return repr(text)[1:-1].replace("`", "'").replace("|", "\\|")
