"""What a package says about itself in its user-defined metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from converters.coreml.format import INTERFACES, METADATA_PREFIX, Interface
from edkm_export.errors import PackageError

__all__ = ["Description"]


_MOST_PACKAGES = 256  # one for each layer of the deepest models


@dataclass(frozen=True)
class Description:
    """What a package says about itself.

    Attributes:
        interface: how it is called.
        context: positions that it can hold.
        prefill: tokens of one prefill call, 0 without.
        packages: file names of all chunks, in the order in which they run.
    """

    interface: Interface
    context: int
    prefill: int
    packages: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, str], path: Path) -> Description | None:
        """Read it; None for a package that does not have it.

        Raises:
            PackageError: an entry is missing or makes no sense.
        """
        if f"{METADATA_PREFIX}interface" not in metadata:
            return None
        name = metadata[f"{METADATA_PREFIX}interface"]
        interface = next((known for known in INTERFACES if known == name), None)
        if interface is None:
            raise PackageError(
                f"{path}: metadata {METADATA_PREFIX}interface is {name!r}, expected one of {', '.join(INTERFACES)}."
            )
        numbers = [_number(metadata, key, path) for key in ("context", "prefill")]
        try:
            packages = json.loads(metadata.get(f"{METADATA_PREFIX}packages", ""))
        except (ValueError, RecursionError):
            packages = None
        if (
            not isinstance(packages, list)
            or not 0 < len(packages) <= _MOST_PACKAGES
            or not all(map(_is_package_name, packages))
            or len({*packages}) != len(packages)
        ):
            raise PackageError(
                f"{path}: metadata {METADATA_PREFIX}packages is not a list of different names of packages, at most "
                f"{_MOST_PACKAGES}."
            )
        return cls(interface, numbers[0], numbers[1], tuple(packages))


def _is_package_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and PurePosixPath(name).name == name
        and name not in ("", ".", "..")
        and "\0" not in name
    )


def _number(metadata: Mapping[str, str], key: str, path: Path) -> int:
    text = metadata.get(METADATA_PREFIX + key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise PackageError(f"{path}: metadata {METADATA_PREFIX}{key} is {text!r}, expected a number.")
    return int(text)
