"""Folders of the repository."""

from pathlib import Path

__all__ = ["FIXTURES", "ROOT"]

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
