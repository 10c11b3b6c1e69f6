"""The index of a checkpoint in parts, as JSON: which rows of which tensor lie where.

`torch.distributed.checkpoint` pickles its index, and unpickling runs whatever a file says. What it holds for tensors is
plain, and is written and read here in its place; of the parts themselves PyTorch loads weights only.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import IO, Annotated, Any

import pydantic
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from edkm_export.regular_file import MOST_JSON_BYTES, read_regular, require_regular
from edkm_export.torch_archive import check_archive

__all__ = ["INDEX", "IndexedReader", "IndexedWriter"]

INDEX = "index.json"
_MOST_BYTES = 16 * MOST_JSON_BYTES  # 200 bytes for each tensor and process
_DTYPES = {
    str(each).removeprefix("torch."): each
    for each in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
    )
}

_Count = Annotated[int, pydantic.Field(ge=0, lt=2**48)]


class _Part(pydantic.BaseModel):
    """Rows of a tensor, and the bytes of a file that hold them."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    offsets: list[_Count]
    sizes: list[_Count]
    file: str = pydantic.Field(pattern=r"^__[0-9]{1,9}_[0-9]{1,9}\.distcp$")
    start: _Count
    length: _Count


class _Tensor(pydantic.BaseModel):
    """A whole tensor and its parts."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    dtype: str
    size: list[_Count]
    parts: list[_Part]

    @pydantic.model_validator(mode="after")
    def _sound(self) -> _Tensor:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype[:40]!r}")
        numel = 0
        for part in self.parts:
            if not len(part.offsets) == len(part.sizes) == len(self.size) or any(
                first + count > whole
                for first, count, whole in zip(part.offsets, part.sizes, self.size, strict=True)
            ):
                raise ValueError("a part lies outside of its tensor")
            if math.prod(part.sizes) * _DTYPES[self.dtype].itemsize > part.length:
                raise ValueError("a part is longer than its bytes")
            numel += math.prod(part.sizes)
        if numel != math.prod(self.size):
            raise ValueError("its parts are not all of it")
        return self


class _Index(pydantic.BaseModel):
    """Tensors by name."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    tensors: dict[str, _Tensor]


class IndexedWriter(FileSystemWriter):
    """Writes parts as its base does, and the index as JSON."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index when all parts are there; called in one process."""
        places = {result.index: result.storage_data for each in results for result in each}
        tensors = {}
        for name, told in metadata.state_dict_metadata.items():
            assert isinstance(told, TensorStorageMetadata)  # nothing else is saved
            parts = []
            for chunk in told.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                parts.append(
                    _Part(
                        offsets=list(chunk.offsets),
                        sizes=list(chunk.sizes),
                        file=place.relative_path,
                        start=place.offset,
                        length=place.length,
                    )
                )
            dtype = str(told.properties.dtype).removeprefix("torch.")
            tensors[name] = _Tensor(dtype=dtype, size=list(told.size), parts=parts)
        path = Path(self.path) / INDEX
        with path.open("w", encoding="utf-8") as file:
            file.write(_Index(tensors=tensors).model_dump_json())
            file.flush()
            os.fsync(file.fileno())


class IndexedReader(FileSystemReader):
    """Reads parts as its base does, by the JSON index; nothing but plain tensors, from files beside it.

    Raises:
        OSError, ValueError: from `read_metadata`, when the index is damaged or names what is not there; from reading,
            when a part is no archive of plain tensors.
    """

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index."""
        folder = Path(self.path)
        index = _Index.model_validate_json(read_regular(folder / INDEX, _MOST_BYTES))
        parts = [part for tensor in index.tensors.values() for part in tensor.parts]
        held = {file: require_regular(folder / file) for file in {part.file for part in parts}}
        for part in parts:
            if part.start + part.length > held[part.file]:
                raise ValueError(f"{INDEX}: a part lies beyond the end of {part.file}")
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=_DTYPES[tensor.dtype]),
                    size=torch.Size(tensor.size),
                    chunks=[
                        ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
                        for part in tensor.parts
                    ],
                )
                for name, tensor in index.tensors.items()
            },
            storage_data={
                MetadataIndex(name, part.offsets): _StorageInfo(part.file, part.start, part.length)
                for name, tensor in index.tensors.items()
                for part in tensor.parts
            },
        )

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        content = io.BytesIO(super()._slice_file(file, sinfo).read())
        check_archive(content, len(content.getbuffer()))
        content.seek(0)
        return content
