"""Deployment targets by the names that people write."""

from __future__ import annotations

import re

from edkm_export.errors import ConversionError

__all__ = ["TARGETS", "parse_target"]

TARGETS = ("iOS16", "iOS17", "iOS18")
"""Oldest systems that a package can be made for, as coremltools names them."""

# Systems of one year hold the same programs; coremltools names them by iOS.
_SAME = {
    "iOS16": ("macos13", "tvos16", "watchos9"),
    "iOS17": ("macos14", "tvos17", "watchos10"),
    "iOS18": ("macos15", "tvos18", "watchos11"),
}
_BY_NAME = {name: target for target, names in _SAME.items() for name in (target.lower(), *names)}


def parse_target(text: str) -> str:
    """One of `TARGETS` for iOS18, ios-18, "iOS 18.0" or macOS15.

    Raises:
        ConversionError: it is none.
    """
    plain = re.sub(r"(\d+)\.\d+(\.\d+)?$", r"\1", re.sub(r"[\s_-]", "", text.lower()))
    if plain in _BY_NAME:
        return _BY_NAME[plain]
    newer = re.fullmatch(r"(?:ios|macos|tvos|watchos)(\d+)", plain)
    hint = f" A package for {TARGETS[-1]} also runs on later systems." if newer and int(newer[1]) > 18 else ""
    raise ConversionError(
        f"target {text!r} is unknown; use one of {', '.join(TARGETS)}, or macOS13, macOS14 or macOS15, which hold the "
        f"same.{hint}"
    )
