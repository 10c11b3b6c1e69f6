"""Options that name a text: what cannot be one is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edkm_export.text import LEAST_TOKENS, check_text

__all__ = ["TextFile"]

_NOT_TEXT = ".tokens"  # training data that is tokenized already


class TextFile(click.Path):
    """A path of a text that is there and holds text.

    Attributes:
        enough: also refuse one that is shorter than the least number of tokens that commands take.
    """

    def __init__(self, *, enough: bool = False) -> None:
        super().__init__(path_type=Path)
        self.enough = enough

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the file.

        Raises:
            InputError: see `check_text`.
        """
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if path.suffix != _NOT_TEXT:
            check_text(path, least_characters=LEAST_TOKENS if self.enough else 1)
        return path
