"""Where a float model comes from: a Hugging Face folder, a hub id or a GGUF file, with a LoRA adapter or without.

Each form has a reader that accounts for every tensor and setting before a weight is used. What a user may have got
wrong about paths is found without torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edkm_export.activity import Activity, activity
from edkm_export.command_line import command_line
from edkm_export.digest import file_sha256s
from edkm_export.errors import InputError
from edkm_export.hub_id import is_hub_id
from edkm_export.reference.account import Account
from edkm_export.reference.adapters import Adapter
from edkm_export.reference.gguf.gguf_file import part_paths
from edkm_export.reference.hf_folder import HfFolder
from edkm_export.reference.hub import commit_of, fetch
from edkm_export.reference.load_errors import explained, without_bars
from edkm_export.reference.origin import Origin, gguf_origin
from edkm_export.reference.sentence_files import is_sentence_folder
from edkm_export.reference.stored_tensors import ADAPTER_CONFIG
from edkm_export.reference.weight_range import check_weight_range

if TYPE_CHECKING:
    import torch

    from edkm_export.embedding_settings import EmbeddingSettings
    from edkm_export.reference.float_weights import FloatWeights
    from edkm_export.reference.gguf.gguf_model import GgufModel
    from edkm_export.reference.sentence_folder import SentenceFolder

__all__ = [
    "Source",
    "SourceReader",
    "account",
    "embedding_settings",
    "load_config",
    "load_embedding_model",
    "load_model",
    "load_tokenizer",
    "open_weights",
    "read_generation_settings",
    "read_origin",
    "require_language_model",
    "value_count",
]


class SourceReader(Protocol):
    """What reads one form of a source. Each method accounts for what it reads, and refuses what is not understood."""

    def account(self) -> Account:
        """What becomes of every tensor and every setting."""

    def load_model(
        self, dtype: torch.dtype | None = None, advance: Callable[[int], None] | None = None
    ) -> Any:
        """The float model of transformers; `advance` is called with numbers of parameters that were read."""

    def stream_model(self, dtype: torch.dtype | None, room_bytes: int) -> Any | None:
        """The same, its weights read layer by layer while it runs; None: they cannot be read one by one."""

    def open_weights(self, dtype: torch.dtype) -> FloatWeights | None:
        """The model without weights, and how to read them one by one; None: see `stream_model`."""

    def load_tokenizer(self) -> Any:
        """The tokenizer of transformers."""


@dataclass(frozen=True)
class Source:
    """A model that transformers can load.

    Attributes:
        reference: what the user gave: a folder, a GGUF file or a hub id.
        location: the folder, or the hub id.
        gguf_file: name of the GGUF file inside `location`, None for other forms.
        adapter: a LoRA adapter that is merged into it, None without.
    """

    reference: str
    location: str
    gguf_file: str | None = None
    adapter: Adapter | None = None

    @classmethod
    def parse(cls, reference: str | Path, adapter: str | Path | None = None) -> Source:
        """Tell the forms apart.

        Args:
            reference: what the user gave as MODEL.
            adapter: folder of a LoRA adapter. Where `reference` is that folder too and holds no model, the base is
                taken from its adapter_config.json, if that names a folder that is here.

        Raises:
            InputError: nothing is there, it is none of the forms, or it holds an adapter that was not asked for.
        """
        merged = None if adapter is None else Adapter.open(adapter)
        reference, path = str(reference), Path(reference)
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                made = (
                    f" It looks like a finished checkpoint: `{command_line('coreml', path)}` takes it."
                    if path.suffix == ".pt"
                    else ""
                )
                raise InputError(
                    f"{reference}: expected a Hugging Face folder, a hub id or a .gguf file, "
                    f"not a {path.suffix or 'plain'} file.{made}"
                )
            return cls(reference, str(path.absolute().parent), path.name, merged)
        if path.is_dir():
            return cls(reference, str(_model_folder(path.absolute(), reference, merged)), None, merged)
        if is_hub_id(reference):
            return cls(reference, reference, None, merged)
        named = "" if "/" in reference or path.suffix else "; models of the hub are named OWNER/NAME"
        raise InputError(f"{reference}: no such file or folder{named}.")

    @property
    def is_quantized(self) -> bool:
        """Whether it is a GGUF file that holds quantized weights.

        Raises:
            InputError: the file is damaged.
        """
        if self.gguf_file is None:
            return False
        from edkm_export.reference.gguf.gguf_file import GgufFile

        return GgufFile.open(self.weight_files()[0]).is_quantized

    @property
    def is_local(self) -> bool:
        """False for a hub id."""
        return Path(self.location).is_dir()

    @property
    def place(self) -> str:
        """Absolute path of what the user gave; a hub id as it is."""
        return str(Path(self.reference).absolute()) if self.is_local else self.reference

    def locate(self) -> Source:
        """Itself, when the hub, which is asked once, has a hub model.

        Raises:
            InputError: there is no such model, or the hub cannot be reached and its cache does not hold it.
        """
        if not self.is_local:
            commit_of(self.location)
        return self

    def weight_files(self) -> list[Path]:
        """Files that hold the weights; empty for a hub id."""
        if not self.is_local:
            return []
        folder = Path(self.location)
        if self.gguf_file:
            return part_paths(folder / self.gguf_file)
        found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
        return (
            [*found, *sorted(folder.glob("[0-9]_*/*.safetensors"))] if is_sentence_folder(folder) else found
        )

    def provenance(self) -> dict[str, Any]:
        """The reference and, for a local model, the sha256 of each weight file; those of an adapter likewise."""
        found: dict[str, Any] = {
            "reference": self.place,
            "sha256": {
                path.relative_to(self.location).as_posix(): digest
                for path, digest in file_sha256s(self.weight_files()).items()
            },
        }
        if self.adapter is not None:
            found["adapter"] = {
                "reference": str(self.adapter.path),
                "sha256": {
                    path.name: digest for path, digest in file_sha256s(self.adapter.weight_files()).items()
                },
            }
        return found


def _model_folder(path: Path, reference: str, adapter: Adapter | None) -> Path:
    """The folder of the base model."""
    has_model = (path / "config.json").is_file()
    if (path / ADAPTER_CONFIG).is_file():
        if adapter is None:
            if has_model:
                advice = (
                    f"to merge it add --adapter {reference}; to leave it out, move it to a folder of its own"
                )
            else:
                advice = f"give its base model as MODEL and add --adapter {reference}"
            raise InputError(
                f"{reference}: holds a LoRA adapter ({ADAPTER_CONFIG}), which changes the model; {advice}."
            )
        if not has_model:
            base = adapter.base()
            if base is None:
                named = adapter.config().get("base_model_name_or_path")
                raise InputError(
                    f"{reference}: is an adapter, and its base model {named!r} is no folder here; give the base model "
                    f"as MODEL, and this as --adapter {adapter.reference}."
                )
            return base
    if not has_model:
        raise InputError(f"{reference}: holds no config.json, so it is not a Hugging Face model folder.")
    return path


def _explaining(source: Source) -> contextlib.AbstractContextManager[None]:
    advice = "check that the folder holds config.json, *.safetensors and the tokenizer of one model"
    return explained(source.reference, needed="gguf" if source.gguf_file else "all", advice=advice)


def _reader(source: Source) -> SourceReader:
    return _gguf(source) if source.gguf_file else _folder(source)


def _gguf(source: Source) -> GgufModel:
    from edkm_export.reference.gguf.gguf_model import read_gguf

    return read_gguf(source.weight_files()[0])


def _folder(source: Source, files: list[str] | None = None) -> HfFolder:
    """The folder of a source; a hub model is fetched."""
    if source.is_local:
        return _opened(source, Path(source.location))
    fetched = fetch(source.location, files)
    return _opened(source, _model_folder(fetched, source.reference, source.adapter))


def _opened(source: Source, path: Path) -> HfFolder:
    if not is_sentence_folder(path):
        return HfFolder(source.reference, path)
    if source.adapter is not None:
        raise InputError(
            f"{source.reference}: is an embedding model, into which no adapter is merged here; merge it with peft and "
            "save the model."
        )
    from edkm_export.reference.sentence_folder import SentenceFolder

    return SentenceFolder(source.reference, path)


def _sentence_folder(source: Source, files: list[str] | None = None) -> SentenceFolder | None:
    """The folder of a source that is an embedding model; None: it is another one."""
    from edkm_export.reference.sentence_folder import SentenceFolder

    found = None if source.gguf_file else _folder(source, files)
    return found if isinstance(found, SentenceFolder) else None


def embedding_settings(source: Source) -> EmbeddingSettings | None:
    """Pooling and what follows it, of a folder of sentence-transformers; None for any other model.

    Raises:
        SourceError: a part of it is not understood.
        InputError: a file is missing or damaged.
    """
    with _explaining(source), without_bars():
        found = _sentence_folder(source, ["*.json"])
        return None if found is None else found.settings()


def require_language_model(source: Source, purpose: str) -> None:
    """Refuse an embedding model where only a language model serves.

    Args:
        source: where it is.
        purpose: what was asked for, such as "train".

    Raises:
        InputError: it is an embedding model.
    """
    with _explaining(source), without_bars():
        if _sentence_folder(source, ["*.json"]) is not None:
            raise InputError(
                f"{source.reference}: is an embedding model (modules.json), and {purpose} takes language models; "
                "palettize, coreml, onnx, verify and inspect take it."
            )


def account(source: Source) -> Account:
    """What becomes of every tensor and every setting of a source, its adapter's included.

    Raises:
        InputError: files are missing or damaged.
        BackendMissingError: a package that reads this form is not installed.
    """
    with _explaining(source), without_bars():
        found = _reader(source).account()
        if source.adapter is None:
            return found
        added = source.adapter.account()

    def own(given: Any) -> dict[str, Any]:
        return {f"adapter: {name}": value for name, value in given.items()}

    return dataclasses.replace(
        found,
        kind=f"{found.kind} with a {added.kind}",
        tensors=(*found.tensors, *(f"adapter: {name}" for name in added.tensors)),
        settings={**found.settings, **own(added.settings)},
        without_effect={**found.without_effect, **own(added.without_effect)},
        not_understood={**found.not_understood, **own(added.not_understood)},
        remarks=(*found.remarks, f"the adapter {source.adapter.path.name} was merged by peft, in float32"),
    )


def load_config(source: Source, *, weights: bool = True) -> Any:
    """The `PretrainedConfig`. Remote code is never run.

    Args:
        source: where it is.
        weights: they are looked at too, since they may say that the output head is not tied to the embedding.

    Raises:
        SourceError: a field is not understood.
        InputError: it cannot be loaded.
    """
    with _explaining(source), without_bars():
        if source.gguf_file:
            return _gguf(source).config()
        if not source.is_local:  # before the weights are fetched
            return _folder(source, ["config.json", "modules.json", ADAPTER_CONFIG]).config(weights=False)
        return _folder(source).config(weights=weights)


def load_model(
    source: Source,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] | None = None,
    room_bytes: int | None = None,
) -> Any:
    """Load a causal language model in eval mode, on the CPU, its adapter merged.

    Args:
        source: where it is.
        dtype: of the weights; None: bfloat16 or float16 where they are stored so, else float32; float16 for GGUF.
        advance: called with numbers of values that were read, where the form is read one by one.
        room_bytes: read each layer from the files when it is used, and keep as many as fit in so many bytes, see
            `streamed_model`. None: read all of them now. A model with an adapter, and a
            folder with quantized weights, are read whole in any case.

    Returns:
        transformers.PreTrainedModel, without a quantizer attached.

    Raises:
        SourceError: a part of it is not understood.
        InputError: it is an embedding model, cannot be loaded, or holds NaN, infinity, or what float16 cannot hold.
        BackendMissingError: GGUF support or peft is not installed.
    """
    import torch

    require_language_model(source, "this command")
    with _explaining(source), without_bars(), _counted(source) as counted:
        if room_bytes is not None and source.adapter is None:
            streamed = _reader(source).stream_model(dtype, room_bytes)
            if streamed is not None:
                return streamed
        advance = advance or counted.advance
        if source.adapter is None:
            model = _reader(source).load_model(dtype, advance)
        else:
            model = source.adapter.merge(_reader(source).load_model(torch.float32, advance))
            if dtype is not None:
                model = model.to(dtype)
    check_weight_range(model, source.reference)
    return model


def open_weights(source: Source, dtype: torch.dtype) -> FloatWeights:
    """The outline of a causal language model, whose weights are read one by one from its files.

    A model with an adapter, and a folder with quantized weights, are read whole, into the memory of the CPU.

    Args:
        source: where it is.
        dtype: of the weights.

    Raises:
        SourceError, InputError, BackendMissingError: see `load_model`; values are checked when they are filled in.
    """
    require_language_model(source, "this command")
    if source.adapter is None:
        with _explaining(source), without_bars():
            opened = _reader(source).open_weights(dtype)
        if opened is not None:
            return opened
    from edkm_export.reference.float_weights import FloatWeights

    return FloatWeights.of(load_model(source, dtype), source.reference)


def load_embedding_model(source: Source, dtype: torch.dtype | None = None) -> Any:
    """Load an embedding model in eval mode, on the CPU.

    Args:
        source: a folder of sentence-transformers, or its hub id.
        dtype: of the weights; None: bfloat16 or float16 where they are stored so, else float32.

    Returns:
        SentenceModel.

    Raises:
        SourceError: a part of it is not understood.
        InputError: it cannot be loaded, or holds NaN, infinity, or what float16 cannot hold.
    """
    with _explaining(source), without_bars(), _counted(source):
        found = _sentence_folder(source)
        if found is None:
            raise InputError(f"{source.reference}: holds no modules.json, so it is no embedding model.")
        model = found.load_model(dtype)
    check_weight_range(model, source.reference)
    return model


def value_count(source: Source) -> int | None:
    """How many values `load_model` reports to `advance` in all; None for a form that is read in one go."""
    with _explaining(source):
        return _gguf(source).values if source.gguf_file else None


def _counted(source: Source) -> contextlib.AbstractContextManager[Activity]:
    """What is shown while a model is read: how many of its values are, where they are read one by one."""
    total = value_count(source)
    return activity(f"reading {Path(source.reference).name}", total, "values" if total else "")


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that belongs to the model: the adapter's, where it has one. Remote code is never run.

    Raises:
        InputError: there is none, or one that transformers cannot read.
    """
    with _explaining(source), without_bars():
        if source.adapter is not None:
            own = HfFolder(source.adapter.reference, source.adapter.path)
            if own.has_tokenizer():
                return own.load_tokenizer()
        return _reader(source).load_tokenizer()


def read_origin(source: Source) -> Origin:
    """Licence and hub id, as far as the source names them; the account of a source holds the same.

    Raises:
        InputError: its files are missing or damaged.
    """
    with _explaining(source):
        return gguf_origin(_gguf(source).file.metadata) if source.gguf_file else _folder(source).origin()


def read_generation_settings(source: Source) -> dict[str, Any] | None:
    """Contents of the generation_config.json of a folder; None without one, and for other forms."""
    if source.gguf_file:
        return None
    with _explaining(source):
        return _folder(source).generation_settings()
