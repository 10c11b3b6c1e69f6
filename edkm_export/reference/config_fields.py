"""Fields of a config.json: used by transformers, known to change no logit, or not understood.

Used is what the configuration class of the model type declares, and the older names that it converts. transformers
itself takes any other field too, and forgets it: what such a field asks for would be missing without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edkm_export.reference.config_class import ConfigClass, config_class
from edkm_export.reference.family_fields import IN_ANY_CASE, ONLY_AS

__all__ = ["ConfigFields", "shaping_fields", "sort_fields"]

_TASKS = "for models of another task"
_OUTPUT = "the form of what the model gives, not its values"
_DROPOUT = "dropout acts in training only"
_GENERATION = "a setting of generation"
_SAVED = "says how the file was made"

_WITHOUT_EFFECT: dict[str, str] = {
    "transformers_version": _SAVED,
    "_name_or_path": _SAVED,
    "name_or_path": _SAVED,
    "_commit_hash": _SAVED,
    "unsloth_version": _SAVED,
    "unsloth_fixed": _SAVED,
    "is_llama_config": _SAVED,
    "dtype": "weights are read in the type that they are stored in",
    "torch_dtype": "weights are read in the type that they are stored in",
    "initializer_range": "for new weights only",
    "block_mlp_init_scale": "for new weights only",
    "block_out_init_scale": "for new weights only",
    "block_use_xavier_init": "for new weights only",
    "conv_use_xavier_init": "for new weights only",
    "mamba_ssm_dtype": "recurrences run in float32",
    "mtp_num_hidden_layers": "layers that guess further tokens are not part of the model",
    "mtp_use_dedicated_embeddings": "layers that guess further tokens are not part of the model",
    "gradient_checkpointing": "for training only",
    "altup_coef_clip": "for training only",
    "altup_lr_multiplier": "for training only",
    "neftune_noise_alpha": "for training only",
    "attention_dropout": _DROPOUT,
    "attn_pdrop": _DROPOUT,
    "embd_pdrop": _DROPOUT,
    "resid_pdrop": _DROPOUT,
    "hidden_dropout": _DROPOUT,
    "hidden_dropout_prob": _DROPOUT,
    "attention_probs_dropout_prob": _DROPOUT,
    "embedding_dropout": _DROPOUT,
    "mlp_dropout": _DROPOUT,
    "classifier_dropout": _TASKS,
    "classifier_activation": _TASKS,
    "classifier_bias": _TASKS,
    "classifier_pooling": _TASKS,
    "decoder_bias": _TASKS,
    "sparse_prediction": _TASKS,
    "sparse_pred_ignore_index": _TASKS,
    "repad_logits_with_grad": "for training only",
    "initializer_cutoff_factor": "for new weights only",
    "deterministic_flash_attn": "which kernel computes attention",
    "reference_compile": "which kernel computes attention",
    "use_cache": "a cache changes no logit",
    "cache_implementation": "a cache changes no logit",
    "return_dict": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_attentions": _OUTPUT,
    "tie_last_hidden_states": _OUTPUT,
    "chunk_size_feed_forward": "the same sums in other portions",
    "pretraining_tp": "the same sums in other portions",
    "reorder_and_upcast_attn": "the precision of half precision training",
    "attention_softmax_in_fp32": "the precision of half precision training",
    "scale_attention_softmax_in_fp32": "the precision of half precision training",
    "attn_implementation": "which kernel computes attention",
    "_attn_implementation": "which kernel computes attention",
    "_attn_implementation_autoset": "which kernel computes attention",
    "use_bfloat16": "weights are read in the type that they are stored in",
    "torchscript": _OUTPUT,
    "is_decoder": "a causal language model is a decoder in any case",
    "id2label": _TASKS,
    "label2id": _TASKS,
    "num_labels": _TASKS,
    "problem_type": _TASKS,
    "finetuning_task": _TASKS,
    "task_specific_params": _TASKS,
    "summary_type": _TASKS,
    "summary_use_proj": _TASKS,
    "summary_activation": _TASKS,
    "summary_proj_to_labels": _TASKS,
    "summary_first_dropout": _TASKS,
    "tokenizer_class": "the tokenizer has a file of its own",
    "prefix": _GENERATION,
    "transformers.js_config": "for transformers.js",
}

# Fields that a class does not declare, and the value with which they ask for nothing.
_ONLY_AS: dict[str, tuple[Any, str]] = {
    "attn_output_gate": (True, "attention has a gate, as its family's always has"),
    "block_use_swiglu": (True, "the MLP is gated"),
    "use_pos_enc": (True, "positions are rotary ones"),
    "mlp_only_layers": ([], "no layer has experts"),
    "rope_interleaved": (False, "rotation by halves, as transformers does it"),
    "attention_bias": (False, "attention has no biases beyond those of the family"),
    "mlp_bias": (False, "the MLP has no biases"),
    "lm_head_bias": (False, "the output head has no bias"),
    "use_mrope": (False, "positions have one axis"),
    "full_attn_mod": (1, "every layer has full attention"),
    "interpolate_factor": (1, "positions are not interpolated"),
    "is_encoder_decoder": (False, "a decoder alone"),
    "tie_encoder_decoder": (False, "a decoder alone"),
    "add_cross_attention": (False, "a decoder alone"),
    "pruned_heads": ({}, "no heads were removed"),
    "position_embedding_type": ("absolute", "positions are those of the family"),
}
# Fields that must say what another one says.
_SAME_AS = {
    "block_dim": "hidden_size",  # LFM2's, up to "num_heads"
    "block_norm_eps": "norm_eps",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
    "num_heads": "num_attention_heads",
    "n_ctx": "n_positions",
    "hidden_act": "hidden_activation",
    "sliding_window_size": "sliding_window",
    "layer_norm_eps": "norm_eps",
    "attention_head_dim": "head_dim",
    "layer_norm_epsilon": "norm_epsilon",
}

_PARTS = {
    "vision_config": "vision",
    "visual": "vision",
    "image_token_index": "vision",
    "image_token_id": "vision",
    "audio_config": "audio",
    "speech_config": "audio",
    "video_token_id": "video",
}

_ROPE_ALWAYS = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
_ROPE_FIELDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"},
    "proportional": {"factor", "partial_rotary_factor"},
}  # fmt: skip
_ROPE_ALIASES = {"su": "longrope"}
# A model that stretches the base of its rotation by a fixed alpha leaves these aside.
_UNUSED_BESIDE_ALPHA = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_ROPE_SETTINGS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


@dataclass
class ConfigFields:
    """What became of each field.

    Attributes:
        used: {field: value}.
        without_effect: {field: why not}.
        not_understood: {field: what is missing}.
        forgotten: fields of `without_effect` that transformers would carry along though nothing reads them.
    """

    used: dict[str, Any] = field(default_factory=dict)
    without_effect: dict[str, str] = field(default_factory=dict)
    not_understood: dict[str, str] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)


def sort_fields(config: Mapping[str, Any], *, embeds: bool = False) -> ConfigFields:
    """Say what becomes of every field of a config.json. `quantization_config` is left to `quantized_weights`.

    Args:
        config: what the file holds.
        embeds: it is that of an embedding model: its token vectors are what is wanted, not logits.
    """
    import transformers

    found = ConfigFields()
    family = config.get("model_type")
    if parts := sorted({kind for name, kind in _PARTS.items() if config.get(name) is not None}):
        name = next(name for name in config if name in _PARTS)
        found.not_understood[name] = (
            f"the {' and '.join(parts)} part of a multimodal model; only text models can be palettized, so give "
            "its text model, saved on its own"
        )
        return found
    kind = config_class(family) if isinstance(family, str) else None
    if not isinstance(family, str) or kind is None:
        own = " and its own Python code is not run" if config.get("auto_map") else ""
        found.not_understood["model_type"] = f"{family!r} is not known to transformers{own}"
        return found
    declared, rotates = kind.declared, kind.rotates
    generation = transformers.GenerationConfig().to_dict().keys()
    for name, value in config.items():
        if name in ("model_type", "quantization_config"):
            found.used[name] = value
        elif name == "architectures":
            _sort_architectures(found, family, value, embeds=embeds)
        elif name == "auto_map":
            found.without_effect[name] = (
                "Python code of the folder, which is not run; transformers has its own"
            )
            found.forgotten.add(name)
        elif name in _WITHOUT_EFFECT:
            found.without_effect[name] = _WITHOUT_EFFECT[name]
            if name not in declared and name not in ("torch_dtype", "num_labels"):
                found.forgotten.add(name)
        elif name == "per_layer_config" and value is not None and not kind.layers_differ:
            found.not_understood[name] = "layers with settings of their own are not supported"
        elif name in ONLY_AS.get(family, ()) and name not in declared:
            _require(found, name, value, *ONLY_AS[family][name])
        elif name in IN_ANY_CASE.get(family, ()) and name not in declared:
            _forget(found, name, IN_ANY_CASE[family][name])
        elif name in _ONLY_AS and (name not in declared or name == "is_encoder_decoder"):
            _require(found, name, value, *_ONLY_AS[name])
        elif rotates and name in ("rope_parameters", "rope_scaling"):
            _sort_rope(found, name, kind, family, value)
        elif rotates and name == "rope_theta" and _said_otherwise(config, value):
            found.not_understood[name] = f"is {value!r}, and rope_parameters says another base"
        elif name == "partial_rotary_factor":
            if kind.rotates_in_part:
                found.used[name] = value
            else:
                _require(found, name, value, 1.0, "heads rotate as a whole")
        elif name in declared or (rotates and name in ("head_dim", "rope_theta") and value is not None):
            found.used[name] = value  # a head size is read where it is not declared, too
        elif name in kind.converted:
            found.used[name] = value
        elif name in _SAME_AS and name not in declared and config.get(_SAME_AS[name]) is not None:
            _require(found, name, value, config[_SAME_AS[name]], f"says what {_SAME_AS[name]} says")
        elif name == "max_window_layers" and not config.get("use_sliding_window"):
            _forget(found, name, "no layer slides by its number")
        elif name == "sliding_window":
            _forget(found, name, f"the {family} family attends to all positions, whatever this says")
        elif name in generation:
            _forget(found, name, _GENERATION)
        elif value is None:
            _forget(found, name, "is not set")
        else:
            found.not_understood[name] = (
                f"a field that the {family} family does not have, with the value {value!r}"
            )
    if config.get("rope_parameters") and config.get("rope_scaling"):
        found.not_understood["rope_scaling"] = "stands beside rope_parameters; which of them is meant?"
    return found


# of a checkpoint's configuration: about weights that are no longer there, and code that is not run
_NEVER = ("quantization_config", "auto_map", "architectures")


def shaping_fields(config: Mapping[str, Any], *, embeds: bool = False) -> dict[str, Any]:
    """The fields from which transformers builds a model, of a configuration that anybody may have written.

    Those that its class declares and that change what is computed. Others would steer transformers itself: the form of
    what it returns, the kernels that it takes, the code that it runs.

    Args:
        config: as it is stored.
        embeds: it is that of an embedding model.
    """
    found = sort_fields(config, embeds=embeds)
    odd = {name.partition(".")[0] for name in found.not_understood}  # transformers refuses them, or not
    kept = (found.used.keys() | odd) - found.without_effect.keys() - set(_NEVER)
    family = config.get("model_type")
    kind = config_class(family) if isinstance(family, str) else None
    declared = {"model_type"} if kind is None else {"model_type", *_ROPE_SETTINGS, *kind.declared}
    return {
        name: value
        for name, value in config.items()
        if name in kept and (name in found.used or name in declared)
    }


def _said_otherwise(config: Mapping[str, Any], base: Any) -> bool:
    """True when `rope_parameters` gives another base than the field of older files."""
    given = config.get("rope_parameters")
    inner = given.get("rope_theta") if isinstance(given, dict) else None
    return inner is not None and base is not None and inner != base


def _forget(found: ConfigFields, name: str, why: str) -> None:
    found.without_effect[name] = why
    found.forgotten.add(name)


def _require(found: ConfigFields, name: str, value: Any, expected: Any, why: str) -> None:
    """A field that has no effect with one value only."""
    if value == expected or value is None:
        _forget(found, name, why)
    else:
        found.not_understood[name] = f"is {value!r}, and only {expected!r} is understood here"


def _sort_architectures(found: ConfigFields, family: str, value: Any, *, embeds: bool) -> None:
    """The class that a file names must be the one that transformers makes for its model type."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    if embeds:
        base = str(MODEL_MAPPING_NAMES.get(family))
        mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        known = {base, *(str(mapping.get(family)) for mapping in mappings)}
        if other := [str(name) for name in value or () if str(name) not in known]:
            found.not_understood["architectures"] = (
                f"names {other[0]}, but the token vectors of model type {family!r} are those of {base}"
            )
        else:
            found.without_effect["architectures"] = f"model type {family!r} decides the class, {base}"
        return
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    if own is None:
        found.not_understood["model_type"] = f"{family!r} is no causal language model"
        return
    known = {own.lower(), str(MODEL_MAPPING_NAMES.get(family)).lower()}
    other = [str(name) for name in value or () if str(name).lower() not in known]
    if other:
        found.not_understood["architectures"] = (
            f"names {other[0]}, but model type {family!r} is read as {own}; only causal language models can be "
            "palettized"
        )
    else:
        found.without_effect["architectures"] = f"model type {family!r} decides the class, {own}"


def _sort_rope(found: ConfigFields, name: str, kind: ConfigClass, family: str, value: Any) -> None:
    """Rotary positions: the kinds of scaling, and the fields of each."""
    if value is None:
        _forget(found, name, "is not set")
        return
    if not isinstance(value, dict):
        found.not_understood[name] = f"is {value!r}, expected an object"
        return
    layers = {each: inner for each, inner in value.items() if each.endswith("_attention")}
    if layers and len(layers) < len(value):
        extra = next(each for each in value if each not in layers)
        found.not_understood[f"{name}.{extra}"] = "stands beside settings of kinds of layers"
    before = len(found.not_understood)
    for prefix, inner in (
        {f"{name}.{each}": inner for each, inner in layers.items()} or {name: value}
    ).items():
        if isinstance(inner, dict):
            _sort_rope_kind(found, prefix, kind, family, inner)
        elif inner is not None:
            found.not_understood[prefix] = f"is {inner!r}, expected an object"
    if len(found.not_understood) == before:
        found.used[name] = value


def _sort_rope_kind(
    found: ConfigFields, prefix: str, config: ConfigClass, family: str, value: Mapping[str, Any]
) -> None:
    named = [value[key] for key in ("rope_type", "type") if value.get(key) is not None]
    kinds = {_ROPE_ALIASES.get(each, each) for each in named if isinstance(each, str)}
    if family == "phi3":  # its older files say yarn for what is longrope
        kinds = {"longrope" if each == "yarn" else each for each in kinds}
    kind = next(iter(kinds), "default")
    if len(kinds) > 1 or kind not in _ROPE_FIELDS:
        found.not_understood[f"{prefix}.rope_type"] = (
            f"is {' and '.join(map(repr, named))}; known are {', '.join(sorted(_ROPE_FIELDS))}"
        )
        return
    known = _ROPE_ALWAYS | _ROPE_FIELDS[kind] | config.rotary | config.rotary_notes
    if "alpha" in config.rotary and value.get("alpha"):
        known |= _UNUSED_BESIDE_ALPHA
    for name, inner in value.items():
        if inner is None or name in known or (name == "partial_rotary_factor" and inner == 1):
            continue
        found.not_understood[f"{prefix}.{name}"] = (
            f"is {inner!r}; rotary positions of kind {kind!r} have no such field"
        )
