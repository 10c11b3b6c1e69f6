"""From a checkpoint to the decoder of its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
import torch

from edkm_export.checkpoint import Checkpoint
from edkm_export.config_bounds import check_config
from edkm_export.decoder.config import ATTENDS, SLIDING, DecoderConfig
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.families import FAMILIES
from edkm_export.decoder.families.settings import Settings
from edkm_export.errors import CheckpointError, ConversionError

__all__ = ["FAMILIES", "build_decoder", "decoder_config", "empty_decoder", "read_settings"]


def decoder_config(config: dict[str, Any], source: str) -> DecoderConfig:
    """Map a Hugging Face configuration to the decoder's.

    Raises:
        ConversionError: the family is not supported, or the configuration lacks a key or holds a wrong value.
    """
    return read_settings(config, FAMILIES, source).decoder_config()


def read_settings(config: dict[str, Any], families: Mapping[str, type[Settings]], source: str) -> Settings:
    """The checked keys of a Hugging Face configuration.

    Args:
        config: what config.json holds.
        families: {`model_type`: what reads it}.
        source: where it is from, for messages.

    Raises:
        ConversionError: the family is not one of these, or the configuration lacks a key or holds a wrong value.
    """
    check_config(config, source, error=ConversionError)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in families:
        raise ConversionError(
            f"{source}: model type {family!r} cannot be exported yet; supported are {', '.join(sorted(families))}."
        )
    try:
        settings = families[family].model_validate(config)
    except pydantic.ValidationError as error:
        raise ConversionError(f"{source}: {_explain(error.errors()[0], family)}") from error
    _check_sizes(settings.decoder_config(), config, source)
    return settings


def _check_sizes(found: DecoderConfig, config: dict[str, Any], source: str) -> None:
    """Refuse values that are right each for itself but not together."""
    sizes = {kind: found.heads_of(kind) for kind in ATTENDS}
    for each in sizes.values():
        if found.num_heads % each.kv_heads:
            raise ConversionError(
                f"{source}: {each.kv_heads} key/value heads do not divide {found.num_heads} heads."
            )
    layers = config.get("num_hidden_layers", found.num_layers)
    if found.num_layers != layers:
        raise ConversionError(
            f"{source}: layer_types of its configuration names {found.num_layers} layers, but num_hidden_layers is "
            f"{layers}; palettize the model again."
        )
    if found.sliding_window is None and SLIDING in found.layer_kinds:
        raise ConversionError(
            f"{source}: some of its layers are of type 'sliding_attention', but sliding_window of its configuration "
            f"is {config.get('sliding_window')!r}; palettize the model again."
        )
    for kind, each in sizes.items():
        if found.rotary_of(kind) % 2:
            raise ConversionError(
                f"{source}: {found.rotary_of(kind)} channels of a head rotate, which must be an even number; it has "
                f"head_dim {each.head_dim}."
            )


def _explain(detail: Any, family: str) -> str:
    key = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"its configuration lacks {key!r}; palettize the model again."
    if detail["type"] == "literal_error":
        expected = detail["ctx"]["expected"].replace("'", "")
        return f"{key} {detail['input']!r} is not supported in the {family} family; use {expected}."
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key} of its configuration is {detail['input']!r}: {message}; palettize the model again."


def empty_decoder(checkpoint: Checkpoint) -> Decoder:
    """The decoder of a checkpoint without its weights, on the meta device.

    Returns:
        Decoder in eval mode; its parameter names are those of the checkpoint.

    Raises:
        ConversionError: unsupported family.
        CheckpointError: a parameter is missing, unknown, or of another shape.
    """
    source = str(checkpoint.path or "checkpoint")
    check_config(checkpoint.config, source, checkpoint.shapes, CheckpointError)
    config = decoder_config(checkpoint.config, source)
    with torch.device("meta"):
        decoder = Decoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    checkpoint.check_parameters(expected)
    if config.tied and "lm_head.weight" not in checkpoint.tied:
        raise CheckpointError(
            f"{source}: lm_head.weight is stored apart, but its configuration says tie_word_embeddings; "
            "palettize the model again."
        )
    return decoder.eval().requires_grad_(False)


@torch.no_grad()
def build_decoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Decoder:
    """The export-friendly decoder with the checkpoint's decoded weights.

    Returns:
        Decoder in eval mode; its parameter names are those of the checkpoint.

    Raises:
        ConversionError, CheckpointError: see `empty_decoder`.
    """
    decoder = empty_decoder(checkpoint)
    decoder.load_state_dict(checkpoint.state_dict(dtype), assign=True)
    decoder.tie()
    return decoder.to(dtype).eval().requires_grad_(False)
