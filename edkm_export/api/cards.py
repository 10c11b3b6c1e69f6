"""What a model card says of a verification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edkm_export.atomic import atomic_file
from edkm_export.model_card import FILE, NOT_VERIFIED, card_verdict, with_verification
from edkm_export.regular_file import read_regular

if TYPE_CHECKING:  # importing it takes torch
    from edkm_export.verify.report import Report

__all__ = ["refresh_card", "verification_words"]


def verification_words(report: Report | None) -> tuple[str, str]:
    """The verdict that decides, and Markdown of both; None: it was not verified."""
    if report is None:
        return NOT_VERIFIED, f"**{NOT_VERIFIED}**: it was exported without a verification."
    from edkm_export.verify.write import quality

    worst = report.quality if report.faithful_export.is_good and report.failed else report.faithful_export
    return worst.value, quality(report)


def refresh_card(folder: Path, report: Report) -> None:
    """Let the card of an exported folder say what a later verification found; a card of others is left alone."""
    path = folder / FILE
    try:
        card = read_regular(path).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if card_verdict(card) is not None:
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text(with_verification(card, *verification_words(report)), encoding="utf-8")
