"""LoRA adapters: merged into their base model by peft before anything else sees the model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edkm_export.errors import BackendMissingError, InputError
from edkm_export.reference.account import Account
from edkm_export.reference.stored_tensors import ADAPTER_CONFIG
from edkm_export.regular_file import read_regular, require_regular

__all__ = ["Adapter"]

_WEIGHTS = "adapter_model.safetensors"
_SAVED = (
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
)
_TRAINING = (
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_config",
    "megatron_core", "qalora_group_size",
)  # fmt: skip
# Settings of peft that change the forward pass in ways that no merged weight holds, and what asks for nothing.
_ONLY_AS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "target_parameters": None,
    "ensure_weight_tying": False,
}
# Initializations that leave the base as it is. Others (PiSSA, OLoRA, CorDA) change it: the adapter fits another one.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    Attributes:
        reference: what the user gave.
        path: the folder.
    """

    reference: str
    path: Path

    @classmethod
    def open(cls, reference: str | Path) -> Adapter:
        """Find an adapter.

        Raises:
            InputError: there is none, it is a pickle, or not a LoRA.
        """
        found = cls(str(reference), Path(reference).absolute())
        if not found.path.is_dir():
            is_file = found.path.is_file()
            raise InputError(
                f"{reference}: {'is a file' if is_file else 'no such folder'}; --adapter takes the folder of an "
                f"adapter, with {ADAPTER_CONFIG} in it."
            )
        if not (found.path / ADAPTER_CONFIG).is_file():
            raise InputError(f"{reference}: holds no {ADAPTER_CONFIG}, so it is no adapter.")
        if not (found.path / _WEIGHTS).is_file():
            pickled = sorted(path.name for path in found.path.glob("adapter_model.*"))
            raise InputError(
                f"{reference}: "
                + (
                    f"its weights are a pickle ({pickled[0]}), which can run code when it is read; save the adapter "
                    "again where you trust it: model.save_pretrained(FOLDER, safe_serialization=True)."
                    if pickled
                    else f"{_WEIGHTS} is missing; copy it from where the adapter is from."
                )
            )
        kind = found.config().get("peft_type")
        if kind != "LORA":
            raise InputError(
                f"{reference}: is an adapter of kind {kind!r}; only LORA can be merged into weights."
            )
        return found

    def config(self) -> dict[str, Any]:
        """Contents of adapter_config.json.

        Raises:
            InputError: it is no JSON object.
        """
        try:
            contents = json.loads(read_regular(self.path / ADAPTER_CONFIG))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.reference}: {ADAPTER_CONFIG} cannot be read: it is no JSON.") from error
        if not isinstance(contents, dict):
            raise InputError(f"{self.reference}: {ADAPTER_CONFIG} is no JSON object.")
        return contents

    def base(self) -> Path | None:
        """The folder of the model that it was trained on, where it names one that is here."""
        named = self.config().get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            return None
        found = next(
            (path for path in (Path(named), self.path / named) if (path / "config.json").is_file()), None
        )
        return None if found is None else found.absolute()

    def weight_files(self) -> list[Path]:
        """The one file of weights."""
        return [self.path / _WEIGHTS]

    def account(self) -> Account:
        """What becomes of every setting and tensor.

        Raises:
            InputError: the file of weights is damaged.
            BackendMissingError: peft is not installed.
        """
        peft = _peft(self.reference)
        known = {each.name for each in dataclasses.fields(peft.LoraConfig)}
        used: dict[str, Any] = {}
        without_effect: dict[str, str] = {}
        not_understood: dict[str, str] = {}
        for name, value in self.config().items():
            if name in _SAVED:
                without_effect[name] = "says how the adapter was made"
            elif name in _TRAINING:
                without_effect[name] = "for training only"
            elif name in _ONLY_AS:
                if value != _ONLY_AS[name] and value is not None:
                    not_understood[name] = f"is {value!r}, which cannot be merged; give the merged model"
                else:
                    without_effect[name] = "is not set"
            elif name == "init_lora_weights" and value not in _INITIALIZATIONS:
                not_understood[name] = (
                    f"is {value!r}, which changes the base model too; give the merged model, or save the adapter with "
                    "path_initial_model_for_weight_conversion"
                )
            elif name in known:
                used[name] = value
            elif value is None:
                without_effect[name] = "is not set"
            else:
                not_understood[name] = (
                    f"is {value!r}, a setting that the installed peft does not know; update it"
                )
        return Account(
            source=self.reference,
            kind="LoRA adapter" + (" (DoRA)" if used.get("use_dora") else ""),
            tensors=tuple(self._read()),
            settings=used,
            without_effect=without_effect,
            not_understood=not_understood,
        )

    def merge(self, model: Any) -> Any:
        """Merge into the base model, in its dtype.

        A head that is tied to the embedding gets a weight of its own where the adapter changes one of the two.

        Args:
            model: the base, transformers.PreTrainedModel; it is used up.

        Returns:
            transformers.PreTrainedModel of the base's class, in eval mode.

        Raises:
            SourceError: a setting is not understood.
            InputError: the adapter does not fit the model.
            BackendMissingError: peft is not installed.
        """
        peft = _peft(self.reference)
        self.account().require_understood()
        settings = {name: value for name, value in self.config().items() if value is not None}
        config = peft.PeftConfig.from_peft_type(**{**settings, "inference_mode": True})
        tied = bool(model.config.tie_word_embeddings)
        if tied:
            _untie(model)
        state = self._read()
        try:
            wrapped = peft.PeftModelForCausalLM(model, config)
            found = peft.set_peft_model_state_dict(wrapped, state)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise InputError(
                f"{self.reference}: does not fit the base model ({reason}); give the model that it was trained on."
            ) from error
        unexpected = sorted(found.unexpected_keys)
        if unexpected:
            raise InputError(
                f"{self.reference}: {unexpected[0]} fits no layer of the base; give the model that it was trained on."
            )
        missing = sorted(name for name in found.missing_keys if _is_of_adapter(name))
        if missing:
            raise InputError(f"{self.reference}: {missing[0]} is missing from {_WEIGHTS}.")
        merged = wrapped.merge_and_unload(safe_merge=True)
        if tied:
            _tie_again(merged)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            merged.__dict__.pop(name, None)
        return merged.eval().requires_grad_(False)

    def _read(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        try:
            require_regular(self.path / _WEIGHTS)
            return dict(load_file(self.path / _WEIGHTS))
        except Exception as error:  # safetensors' errors have no common base
            raise InputError(
                f"{self.reference}: {_WEIGHTS} cannot be read; it is damaged, copy it again."
            ) from error


def _untie(model: Any) -> None:
    """Two weights while an adapter is merged: a change of one of them is none of the other."""
    import torch

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _tie_again(model: Any) -> None:
    """Share the weight of head and embedding where both are still equal."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True


def _is_of_adapter(name: str) -> bool:
    return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens"))


def _peft(reference: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise BackendMissingError(
            f"{reference}: merging a LoRA adapter needs peft; pip install 'edkm-export[peft]'"
        ) from error
    return peft
