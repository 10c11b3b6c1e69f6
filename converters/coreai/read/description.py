"""What an exported asset says about itself in its metadata; docs/coreai.md lists the keys.

Everything here is a claim of the file. Names and shapes that come from it are checked against the program by whoever
uses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from converters.coreai.format import DESCRIPTION_KEY, FORMAT, Interface
from edkm_export.errors import PackageError
from edkm_export.kv_cache import FLOAT, KVCache

__all__ = ["DenseEntry", "Description", "PaletteEntry", "read_description"]

_Size = Annotated[int, pydantic.Field(gt=0, lt=1 << 31)]
_Digest = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class DenseEntry(_Part):
    """A weight that is not palettized."""

    shape: Annotated[list[_Size], pydantic.Field(max_length=8)]
    digest: _Digest

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class PaletteEntry(_Part):
    """A palettized weight: dense shape, bits of an index in the checkpoint, digest of what is stored."""

    dense_shape: Annotated[list[_Size], pydantic.Field(min_length=2, max_length=8)]
    n_bits: pydantic.conint(ge=1, le=8)  # type: ignore[valid-type]
    digest: _Digest

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return tuple(self.dense_shape)


class Description(_Part):
    """Our entry in the metadata.

    Attributes:
        format: version of this entry.
        version: release that wrote it.
        interface: which engine runs the model.
        context: positions that its tables hold.
        vocab_size: tokens.
        palettized: weights with a palette, by name.
        dense: all others, by name.
        tied: {alias: parameter that is stored}.
        kv_cache: how keys and values are held; files that do not say it hold floats.
    """

    format: int
    version: str
    interface: Interface
    context: Annotated[int, pydantic.Field(gt=1, lt=1 << 24)]
    vocab_size: Annotated[int, pydantic.Field(gt=0, lt=1 << 24)]
    palettized: dict[str, PaletteEntry]
    dense: dict[str, DenseEntry]
    tied: dict[str, str]
    kv_cache: KVCache = FLOAT


def read_description(metadata: Mapping[str, Any]) -> Description:
    """Parse and check the entry.

    Args:
        metadata: custom metadata of an asset.

    Raises:
        PackageError: it is missing, or makes no sense; the message names no file.
    """
    entry = metadata.get(DESCRIPTION_KEY)
    if not isinstance(entry, dict):
        raise PackageError(
            f"its metadata has no entry {DESCRIPTION_KEY}: it was not exported by edkm-export, and its weights have no "
            "names; `edkm-export inspect` shows what is in it."
        )
    if entry.get("format") != FORMAT:
        raise PackageError(
            f"its metadata is of format {entry.get('format')!r:.40}, this release reads {FORMAT}; export it again."
        )
    try:
        return Description.model_validate(entry)
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        raise PackageError(f"its metadata: {place:.200}: {detail['msg']}.") from error
