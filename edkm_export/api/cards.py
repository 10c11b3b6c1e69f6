"""What a model card says of a verification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edkm_export.model_card import FILE, card_verdict, with_verification

if TYPE_CHECKING:  # importing it takes torch
    from edkm_export.verify.report import Report

__all__ = ["NOT_VERIFIED", "refresh_card", "verification_words"]

NOT_VERIFIED = "NOT VERIFIED"


def verification_words(report: Report | None) -> tuple[str, str]:
    """Verdict and Markdown; None: it was not verified."""
    if report is None:
        return NOT_VERIFIED, f"**{NOT_VERIFIED}**: it was exported without a verification."
    from edkm_export.verify.write import quality

    return report.verdict.value, quality(report)


def refresh_card(folder: Path, report: Report) -> None:
    """Let the card of an exported folder say what a later verification found; a card of others is left alone."""
    path = folder / FILE
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if card_verdict(card) is not None:
        path.write_text(with_verification(card, *verification_words(report)), encoding="utf-8")
