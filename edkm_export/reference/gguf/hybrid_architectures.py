"""Models in which some layers do not attend: LFM2 and Qwen3.5."""

from __future__ import annotations

from edkm_export.reference.gguf.described import Described, common, rms_norms, rotation
from edkm_export.reference.gguf.gguf_file import GgufFile
from edkm_export.reference.gguf.gguf_settings import GgufSettings

__all__ = ["lfm2", "qwen35"]


def lfm2(settings: GgufSettings, file: GgufFile) -> Described:
    """A layer without heads of keys and values is a short convolution."""
    layers = settings.integer("block_count", low=1)
    heads = _kv_heads(settings, layers)
    config = common(settings, file, kv_heads=max(heads) or None)
    epsilon = rms_norms(settings)["rms_norm_eps"]
    found = rotation(settings, file, config)
    if settings.integer("attention.sliding_window", 0):
        settings.refuse("attention.sliding_window", "lfm2 has no layers that slide")
    kernel = settings.integer("shortconv.l_cache", low=2)
    config |= {
        "norm_eps": epsilon,
        "rope_parameters": found.parameters,
        "conv_L_cache": kernel,
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention" if count else "conv" for count in heads],
    }
    return Described("lfm2", config, found.tensors)


def _kv_heads(settings: GgufSettings, layers: int) -> list[int]:
    """Of each layer; all that have any have the same number."""
    given = settings.raw("attention.head_count_kv")
    if not isinstance(given, list):
        return [settings.integer("attention.head_count_kv", low=1)] * layers
    whole = all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in given)
    if not whole or len(given) != layers or len(set(given) - {0}) > 1:
        settings.refuse("attention.head_count_kv", f"is no list of {layers} numbers, zero or the same")
        return [1] * layers
    return given


def qwen35(settings: GgufSettings, file: GgufFile) -> Described:
    """Gated DeltaNet in most layers; keys and values of a head have one size in llama.cpp."""
    config = common(settings, file) | rms_norms(settings)
    layers = config["num_hidden_layers"]
    if settings.integer("nextn_predict_layers", 0):
        settings.refuse(
            "nextn_predict_layers", "layers that predict several tokens at once are not supported"
        )
    found = rotation(settings, file, config, part=True)
    _positions_of_text(settings, found.dimensions // 2)
    size, value_heads = (
        settings.integer("ssm.state_size", low=1),
        settings.integer("ssm.time_step_rank", low=1),
    )
    inner = settings.integer("ssm.inner_size", low=1)
    if inner != size * value_heads:
        settings.refuse("ssm.inner_size", f"is {inner}; {value_heads} heads of {size} channels have another")
    key_heads = settings.integer("ssm.group_count", low=1)
    if value_heads % key_heads:
        settings.refuse("ssm.group_count", f"{key_heads} does not divide {value_heads} heads of values")
    every = settings.integer("full_attention_interval", 4, low=1)
    config |= {
        "rope_parameters": {"partial_rotary_factor": 1.0, **found.parameters},
        "attention_bias": False,
        "linear_conv_kernel_dim": settings.integer("ssm.conv_kernel", low=2),
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "layer_types": [
            "linear_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
        ],
    }
    return Described("qwen3_5_text", config, found.tensors)


def _positions_of_text(settings: GgufSettings, pairs: int) -> None:
    """Sections of the rotation that follow time, height, width and nothing; of a text, the first three are one.

    Pair i follows section i modulo 3 while there is room in it, and otherwise the fourth, whose positions are zero.
    """
    sections = settings.items("rope.dimension_sections", int)
    if len(sections) != 4 or min(sections) < 0 or sections[3]:
        settings.refuse("rope.dimension_sections", f"is {sections}, expected three numbers and a zero")
        return
    total = sum(sections)
    if not total or any(pair % total >= 3 * sections[pair % total % 3] for pair in range(pairs)):
        settings.refuse(
            "rope.dimension_sections", f"{sections} leave some of {pairs} pairs without positions"
        )
