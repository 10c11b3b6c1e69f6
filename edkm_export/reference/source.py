"""Where a float model comes from: a Hugging Face folder, a hub id or a GGUF file, with a LoRA adapter or without.

Each form has a reader that accounts for every tensor and setting before a weight is used. What a user may have got
wrong about paths is found without torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edkm_export.end_tokens import as_setting, end_tokens
from edkm_export.errors import BackendMissingError, EdkmExportError, InputError
from edkm_export.reference.account import Account
from edkm_export.reference.adapters import Adapter
from edkm_export.reference.gguf.gguf_file import part_paths
from edkm_export.reference.hf_folder import HfFolder
from edkm_export.reference.stored_tensors import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch

    from edkm_export.reference.gguf.gguf_model import GgufModel

__all__ = [
    "Source",
    "SourceReader",
    "account",
    "load_config",
    "load_model",
    "load_tokenizer",
    "read_generation_settings",
    "tokenizer_files",
    "value_count",
]

_HASH_CHUNK = 1 << 24
_FLOAT16_LIMIT = 65504.0
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_NOT_FROM_HUB = ["*/*", "consolidated*", "adapter_model*"]


class SourceReader(Protocol):
    """What reads one form of a source. Each method accounts for what it reads, and refuses what is not understood."""

    def account(self) -> Account:
        """What becomes of every tensor and every setting."""

    def load_model(
        self, dtype: torch.dtype | None = None, advance: Callable[[int], None] | None = None
    ) -> Any:
        """The float model of transformers; `advance` is called with numbers of parameters that were read."""

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
                    " It looks like a finished checkpoint: `edkm-export coreml` takes it."
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
        if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
            raise InputError(f"{reference}: no such file or folder.")
        return cls(reference, reference, None, merged)

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

    def weight_files(self) -> list[Path]:
        """Files that hold the weights; empty for a hub id."""
        if not self.is_local:
            return []
        folder = Path(self.location)
        if self.gguf_file:
            return part_paths(folder / self.gguf_file)
        return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))

    def provenance(self) -> dict[str, Any]:
        """The reference and, for a local model, the sha256 of each weight file; those of an adapter likewise."""
        found: dict[str, Any] = {
            "reference": str(Path(self.reference).absolute()) if self.is_local else self.reference,
            "sha256": {path.name: _sha256(path) for path in self.weight_files()},
        }
        if self.adapter is not None:
            found["adapter"] = {
                "reference": str(self.adapter.path),
                "sha256": {path.name: _sha256(path) for path in self.adapter.weight_files()},
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


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


@contextlib.contextmanager
def _explaining(source: Source) -> Iterator[None]:
    """Turn what transformers raises for a bad model into one line that says what to do."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except EdkmExportError:
        raise
    except ImportError as error:
        needed = "gguf" if source.gguf_file else "all"
        raise BackendMissingError(
            f"{source.reference}: {_first_line(error)}; pip install 'edkm-export[{needed}]'"
        ) from error
    except Exception as error:  # what a damaged model raises has no common base
        if source.is_local:
            advice = "check that the folder holds config.json, *.safetensors and the tokenizer of one model"
        else:
            advice = "no such local folder; to use a hub model, check the name and the network"
        raise InputError(f"{source.reference}: cannot be loaded ({_first_line(error)}); {advice}.") from error
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _reader(source: Source) -> SourceReader:
    return _gguf(source) if source.gguf_file else _folder(source)


def _gguf(source: Source) -> GgufModel:
    from edkm_export.reference.gguf.gguf_model import read_gguf

    return read_gguf(source.weight_files()[0])


def _folder(source: Source, files: list[str] | None = None) -> HfFolder:
    """The folder of a source; a hub model is fetched, pickles and code excepted."""
    if source.is_local:
        return HfFolder(source.reference, Path(source.location))
    import huggingface_hub

    fetched = huggingface_hub.snapshot_download(
        source.location, allow_patterns=files or _HUB_FILES, ignore_patterns=_NOT_FROM_HUB
    )
    return HfFolder(source.reference, Path(fetched))


def account(source: Source) -> Account:
    """What becomes of every tensor and every setting of a source, its adapter's included.

    Raises:
        InputError: files are missing or damaged.
        BackendMissingError: a package that reads this form is not installed.
    """
    with _explaining(source), _quiet_progress():
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
    with _explaining(source), _quiet_progress():
        if source.gguf_file:
            return _gguf(source).config()
        if not source.is_local:  # before the weights are fetched
            return _folder(source, ["config.json"]).config(weights=False)
        return _folder(source).config(weights=weights)


def load_model(
    source: Source, dtype: torch.dtype | None = None, advance: Callable[[int], None] | None = None
) -> Any:
    """Load a causal language model in eval mode, on the CPU, its adapter merged.

    Args:
        source: where it is.
        dtype: of the weights; None: bfloat16 or float16 where they are stored so, else float32; float16 for GGUF.
        advance: called with numbers of values that were read, where the form is read one by one.

    Returns:
        transformers.PreTrainedModel, without a quantizer attached.

    Raises:
        SourceError: a part of it is not understood.
        InputError: it cannot be loaded, or holds NaN, infinity, or what float16 cannot hold.
        BackendMissingError: GGUF support or peft is not installed.
    """
    import torch

    with _explaining(source), _quiet_progress():
        if source.adapter is None:
            model = _reader(source).load_model(dtype, advance)
        else:
            model = source.adapter.merge(_reader(source).load_model(torch.float32, advance))
            if dtype is not None:
                model = model.to(dtype)
    _check_values(model, source)
    return model


def _check_values(model: Any, source: Source) -> None:
    """Every export computes in float16: a weight beyond it would become infinity there."""
    import torch

    for name, parameter in model.named_parameters():
        least, most = (float(each) for each in torch.aminmax(parameter.data))
        extreme = most if abs(most) >= abs(least) else least
        if not abs(least) + abs(most) < float("inf"):
            raise InputError(f"{source.reference}: {name} holds NaN or infinity; the model is broken.")
        if abs(extreme) > _FLOAT16_LIMIT:
            raise InputError(
                f"{source.reference}: {name} holds {extreme:,.9g}, beyond {_FLOAT16_LIMIT:,.0f}, the largest float16 "
                "value, and lookup tables are float16; scale this weight down in the model, or mend it."
            )


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """Without the bars of transformers. Standard error stays open: the caller's own bar is drawn there."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def value_count(source: Source) -> int | None:
    """How many values `load_model` reports to `advance` in all; None for a form that is read in one go."""
    with _explaining(source):
        return _gguf(source).values if source.gguf_file else None


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that belongs to the model: the adapter's, where it has one. Remote code is never run.

    Raises:
        InputError: there is none, or one that transformers cannot read.
    """
    with _explaining(source), _quiet_progress():
        if source.adapter is not None:
            own = HfFolder(source.adapter.reference, source.adapter.path)
            if own.has_tokenizer():
                return own.load_tokenizer()
        return _reader(source).load_tokenizer()


def read_generation_settings(source: Source) -> dict[str, Any] | None:
    """Contents of the generation_config.json of a folder; None without one, and for other forms."""
    if source.gguf_file:
        return None
    with _explaining(source):
        return _folder(source).generation_settings()


def tokenizer_files(tokenizer: Any, model: Any) -> dict[str, bytes]:
    """What an app needs beside the weights: tokenizer, chat template and generation settings, {name: bytes}.

    The end tokens in generation_config.json are all that the tokenizer, the model's configuration and its generation
    settings name; the model's configuration is given the same ones.
    """
    generation = getattr(model, "generation_config", None)
    known = {} if generation is None else generation.to_dict()
    ends = end_tokens(known, model.config.to_dict(), {"eos_token_id": tokenizer.eos_token_id})
    model.config.eos_token_id = as_setting(ends)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if generation is not None:
            generation.save_pretrained(folder)
        files = {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.name != "config.json"
        }
    name = "generation_config.json"
    settings = json.loads(files[name]) if name in files else {}
    if ends:
        settings["eos_token_id"] = as_setting(ends)
    if settings:
        files[name] = _as_json(settings)
    _make_portable(files, tokenizer.chat_template)
    return files


def _as_json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _make_portable(files: dict[str, bytes], template: str | dict[str, str] | None) -> None:
    """Keep the maker's folders out of what is shipped, and say what every runtime knows.

    transformers writes a chat template into a file of its own; older readers and apps look for it in
    tokenizer_config.json, where several have their names.
    """
    name = "tokenizer_config.json"
    if name in files:
        settings = json.loads(files[name])
        for key in (
            "name_or_path",
            "tokenizer_file",
            "vocab_file",
            "local_files_only",
            "is_local",
            "backend",
        ):
            settings.pop(key, None)
        if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5 only
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(template, str):
            settings["chat_template"] = template
        elif template:
            settings["chat_template"] = [{"name": key, "template": text} for key, text in template.items()]
            files.pop("chat_template.jinja", None)  # the others would be lost beside it
        files[name] = _as_json(settings)
