"""Where the parts of an exported Core AI model lie."""

from __future__ import annotations

from pathlib import Path

from converters.coreai.format import ASSET_SUFFIX, TOKENIZER_FOLDER
from edkm_export.errors import PackageError

__all__ = ["find_asset", "is_coreai", "tokenizer_folder"]


def is_coreai(path: Path) -> bool:
    """True for an .aimodel, and for a folder with one in it."""
    return path.suffix == ASSET_SUFFIX or (path.is_dir() and any(path.glob(f"*{ASSET_SUFFIX}")))


def find_asset(path: Path) -> Path:
    """The .aimodel that a user means: itself, or the one inside a folder.

    Raises:
        PackageError: there is none, or more than one.
    """
    if path.suffix == ASSET_SUFFIX:
        return path
    found = sorted(path.glob(f"*{ASSET_SUFFIX}"))
    if len(found) != 1:
        raise PackageError(
            f"{path}: expected one {ASSET_SUFFIX} in it, found {len(found)}; make one with "
            "`edkm-export coreai model.pt`."
        )
    return found[0]


def tokenizer_folder(asset: Path) -> Path:
    """Where the tokenizer of an .aimodel lies."""
    return asset.absolute().parent / TOKENIZER_FOLDER
