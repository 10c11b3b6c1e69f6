"""Model families that can be exported, and how their configurations map to the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pydantic
import torch

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import CheckpointError, ConversionError
from edkm_export.models.decoder import Decoder, DecoderConfig

__all__ = ["FAMILIES", "build_decoder", "check_parameters", "decoder_config"]


class _LlamaSettings(pydantic.BaseModel):
    """What the decoder needs of a Llama configuration; files come from anywhere, so every value is checked."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    vocab_size: pydantic.PositiveInt
    hidden_size: pydantic.PositiveInt
    intermediate_size: pydantic.PositiveInt
    num_hidden_layers: pydantic.PositiveInt
    num_attention_heads: pydantic.PositiveInt
    num_key_value_heads: pydantic.PositiveInt | None = None
    head_dim: pydantic.PositiveInt | None = None
    max_position_embeddings: pydantic.PositiveInt = 2048
    rms_norm_eps: pydantic.PositiveFloat = 1e-6
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


def _llama(config: dict[str, Any]) -> DecoderConfig:
    """Llama 2 and 3, SmolLM2, TinyLlama."""
    settings = _LlamaSettings.model_validate(config)
    heads = settings.num_attention_heads
    return DecoderConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=settings.num_key_value_heads or heads,
        head_dim=settings.head_dim or settings.hidden_size // heads,
        max_positions=settings.max_position_embeddings,
        norm_eps=settings.rms_norm_eps,
        qkv_bias=settings.attention_bias,
        output_bias=settings.attention_bias,
        mlp_bias=settings.mlp_bias,
        tied=settings.tie_word_embeddings,
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], DecoderConfig]] = {"llama": _llama}
"""{`model_type` of the Hugging Face configuration: its mapping}."""


def decoder_config(config: dict[str, Any], source: str) -> DecoderConfig:
    """Map a Hugging Face configuration to the decoder's.

    Raises:
        ConversionError: the family is not supported, or the configuration lacks a key or holds a wrong value.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConversionError(
            f"{source}: model type {family!r} cannot be exported yet; supported are {', '.join(sorted(FAMILIES))}."
        )
    try:
        found = FAMILIES[family](config)
    except pydantic.ValidationError as error:
        raise ConversionError(f"{source}: {_explain(error.errors()[0], family)}") from error
    if found.num_heads % found.num_kv_heads:
        raise ConversionError(
            f"{source}: {found.num_kv_heads} key/value heads do not divide {found.num_heads} heads."
        )
    return found


def _explain(detail: Any, family: str) -> str:
    key = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"its configuration lacks {key!r}; palettize the model again."
    if detail["type"] == "literal_error":
        expected = detail["ctx"]["expected"].strip("'")
        return f"{key} {detail['input']!r} is not supported in the {family} family; use {expected}."
    return f"{key} of its configuration is {detail['input']!r}: {detail['msg']}; palettize the model again."


@torch.no_grad()
def build_decoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Decoder:
    """The export-friendly decoder with the checkpoint's decoded weights.

    Returns:
        Decoder in eval mode; its parameter names are those of the checkpoint.

    Raises:
        ConversionError: unsupported family.
        CheckpointError: a parameter is missing, unknown, or of another shape.
    """
    source = str(checkpoint.path or "checkpoint")
    config = decoder_config(checkpoint.config, source)
    with torch.device("meta"):
        decoder = Decoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    check_parameters(checkpoint, expected, source)
    state = checkpoint.state_dict(dtype)
    decoder.load_state_dict(state, assign=True)
    if config.tied:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    return decoder.eval().requires_grad_(False)


def check_parameters(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], source: str) -> None:
    """Compare a checkpoint's names and shapes with the model's.

    Raises:
        CheckpointError: naming the parameter that is missing, unknown or misshapen.
    """
    actual = {name: tensor.shape for name, tensor in checkpoint.palettized.items()}
    actual |= {name: tuple(tensor.shape) for name, tensor in checkpoint.dense.items()}
    actual |= {name: actual[target] for name, target in checkpoint.tied.items()}
    again = "palettize the model again"
    for name in expected:
        if name not in actual:
            raise CheckpointError(f"{source}: parameter {name} is missing; {again}.")
    for name, shape in actual.items():
        if name not in expected:
            raise CheckpointError(f"{source}: parameter {name} is not part of the model; {again}.")
        if shape != expected[name]:
            raise CheckpointError(
                f"{source}: parameter {name} has shape {list(shape)}, the model needs {list(expected[name])}; {again}."
            )
