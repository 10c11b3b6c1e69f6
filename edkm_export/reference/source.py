"""Where a float model comes from: a Hugging Face folder, a hub id or a GGUF file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edkm_export.errors import BackendMissingError, InputError
from edkm_export.reference.gguf.gguf_file import part_paths
from edkm_export.reference.gguf.gguf_model import GgufModel, read_gguf

__all__ = ["Source", "load_config", "load_model", "load_tokenizer", "tokenizer_files"]

_HASH_CHUNK = 1 << 24
# Constants that older versions of transformers saved with the weights.
_CONSTANTS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Source:
    """A model that transformers can load.

    Attributes:
        reference: what the user gave: a folder, a GGUF file or a hub id.
        location: argument of `from_pretrained`: the folder, or the hub id.
        gguf_file: name of the GGUF file inside `location`, None for other forms.
    """

    reference: str
    location: str
    gguf_file: str | None = None

    @classmethod
    def parse(cls, reference: str) -> Source:
        """Tell the three forms apart.

        Raises:
            InputError: nothing is there, or it is none of the three forms.
        """
        path = Path(reference)
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
            return cls(reference, str(path.absolute().parent), path.name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise InputError(
                    f"{reference}: holds no config.json, so it is not a Hugging Face model folder."
                )
            return cls(reference, str(path.absolute()))
        if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
            raise InputError(f"{reference}: no such file or folder.")
        return cls(reference, reference)

    @property
    def is_local(self) -> bool:
        """False for a hub id."""
        return Path(self.location).is_dir()

    def weight_files(self) -> list[Path]:
        """Files that hold the weights; empty for a hub id."""
        if not self.is_local:
            return []
        folder = Path(self.location)
        return part_paths(folder / self.gguf_file) if self.gguf_file else sorted(folder.glob("*.safetensors"))

    def provenance(self) -> dict[str, Any]:
        """The reference and, for a local model, the sha256 of each weight file."""
        return {
            "reference": str(Path(self.reference).absolute()) if self.is_local else self.reference,
            "sha256": {path.name: _sha256(path) for path in self.weight_files()},
        }


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
    except BackendMissingError:
        raise
    except ImportError as error:
        needed = "gguf" if source.gguf_file else "all"
        raise BackendMissingError(
            f"{source.reference}: {_first_line(error)}; pip install 'edkm-export[{needed}]'"
        ) from error
    except InputError:
        raise
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


def _gguf(source: Source) -> GgufModel:
    return read_gguf(source.weight_files()[0])


def load_config(source: Source) -> Any:
    """The `PretrainedConfig`. Remote code is never run."""
    import transformers

    with _explaining(source):
        if source.gguf_file:
            return _gguf(source).config()
        return transformers.AutoConfig.from_pretrained(source.location, trust_remote_code=False)


def load_model(
    source: Source, dtype: torch.dtype | None = None, advance: Callable[[int], None] | None = None
) -> Any:
    """Load a causal language model in eval mode, on the CPU.

    Args:
        source: where it is.
        dtype: of the weights; None keeps bfloat16 and float16 as they are and takes float32 as float16,
            which is the precision of every deployment target.
        advance: called with numbers of values that were read, where the form is read one by one.

    Returns:
        transformers.PreTrainedModel, without a quantizer attached.

    Raises:
        InputError: it cannot be loaded, or holds NaN.
        BackendMissingError: GGUF support is not installed.
    """
    import transformers

    if source.gguf_file:
        with _explaining(source):
            return _gguf(source).load_model(dtype, advance)
    if dtype is None:
        stored = getattr(load_config(source), "dtype", None)
        dtype = torch.bfloat16 if stored == torch.bfloat16 else torch.float16
    with _explaining(source), _quiet_progress():
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,  # the older format is a pickle
        )
    _check_loaded(source, found)
    return model.eval().requires_grad_(False)


def _check_loaded(source: Source, found: dict[str, Any]) -> None:
    """Refuse a model of which parts were made up: transformers fills in what is missing with random numbers."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"{source.reference}: parameter {missing[0]} is missing from its weights.")
    mismatched = sorted(str(each[0]) for each in found["mismatched_keys"])
    if mismatched:
        raise InputError(
            f"{source.reference}: parameter {mismatched[0]} has another shape than config.json says."
        )
    unexpected = sorted(name for name in found["unexpected_keys"] if not name.endswith(_CONSTANTS))
    if unexpected:
        raise InputError(
            f"{source.reference}: parameter {unexpected[0]} is not part of the model in config.json."
        )


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a bar that has no switch
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that belongs to the model. Remote code is never run."""
    import transformers

    with _explaining(source), _quiet_progress():
        if source.gguf_file:
            return _gguf(source).load_tokenizer()
        return transformers.AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)


def tokenizer_files(tokenizer: Any, model: Any) -> dict[str, bytes]:
    """What an app needs beside the weights: tokenizer, chat template and generation settings, {name: bytes}."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        files = {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.name != "config.json"
        }
    _make_portable(files)
    return files


def _make_portable(files: dict[str, bytes]) -> None:
    """Keep the maker's folders out of what is shipped, and name a tokenizer class that every runtime knows."""
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
        files[name] = (json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
