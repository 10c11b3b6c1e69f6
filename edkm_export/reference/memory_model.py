"""A causal language model of transformers that is in memory, as a source: what it holds, and what is not understood."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from torch import nn

from edkm_export.errors import InputError, SourceError
from edkm_export.reference.account import Account
from edkm_export.reference.config_fields import sort_fields
from edkm_export.reference.conv1d import as_linear
from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.reference.weight_range import check_weight_range

__all__ = ["account_of_model", "is_causal_lm", "portable", "require_plain"]


def is_causal_lm(model: object) -> bool:
    """Whether it is the class that transformers itself makes for the text generation of its model type."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or not isinstance(family, str):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return bool(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family) == type(model).__name__)


def require_plain(model: nn.Module, where: str) -> None:
    """Refuse a model that computes with more than its own weights.

    Raises:
        InputError: it is wrapped by an adapter or a compiler, or its weights are quantized.
    """
    if hasattr(model, "merge_and_unload"):
        raise InputError(
            f"{where}: is a model with an adapter ({type(model).__name__}); merge it first: model.merge_and_unload()."
        )
    if hasattr(model, "_orig_mod"):
        raise InputError(f"{where}: is a compiled model; give the one that was compiled: model._orig_mod.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(
            f"{where}: its weights are quantized; load it without a quantization_config, or dequantize() it first."
        )


def account_of_model(model: Any, where: str) -> Account:
    """Every parameter and every setting of a model in memory, checked against what transformers makes of its settings.

    Args:
        model: see `is_causal_lm`.
        where: what to call it in messages.

    Raises:
        SourceError: a setting is not understood.
        InputError: it has other parameters than its configuration says, or values that no export can hold.
    """
    import accelerate
    import transformers

    require_plain(model, where)
    settings = model.config.to_dict()
    fields = sort_fields(settings)
    if fields.not_understood:
        name, why = next(iter(fields.not_understood.items()))
        raise SourceError(
            f"{where}: {name} of its configuration: {why}. Without it this would be another model."
        )
    with accelerate.init_empty_weights():
        skeleton = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*found, *expected]:
        if found.get(name) != expected.get(name):
            ours, theirs = (
                list(shapes[name]) if name in shapes else "missing" for shapes in (found, expected)
            )
            raise InputError(
                f"{where}: {name} is {ours}, but {theirs} in a {type(skeleton).__name__} of its configuration; an "
                "adapter must be merged, and other changes of the model cannot be exported."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            state = (
                "has no values (it is on the meta device)" if parameter.is_meta else f"is {parameter.dtype}"
            )
            raise InputError(f"{where}: {name} {state}, expected floating point; load the model whole.")
    check_weight_range(model, where)
    return Account(
        source=where,
        kind=f"transformers model in memory ({type(model).__name__})",
        tensors=tuple(as_linear(model, {**dict(model.named_parameters()), **stored_buffers(model)})),
        settings=fields.used,
        without_effect=fields.without_effect,
    )


def portable(model: Any) -> Any:
    """Copies of a model's configuration and generation settings, without the folder that they are from.

    Returns:
        An object with `config` and `generation_config`, which may be changed.
    """
    config = copy.deepcopy(model.config)
    config._name_or_path = ""
    return SimpleNamespace(
        config=config, generation_config=copy.deepcopy(getattr(model, "generation_config", None))
    )
