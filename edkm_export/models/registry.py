"""Model families that can be exported, and how their configurations map to the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import CheckpointError, ConversionError
from edkm_export.models.decoder import Decoder, DecoderConfig

__all__ = ["FAMILIES", "build_decoder", "check_parameters", "decoder_config"]


def _llama(config: dict[str, Any]) -> DecoderConfig:
    """Llama 2 and 3, SmolLM2, TinyLlama."""
    if config.get("hidden_act", "silu") != "silu":
        raise ConversionError(
            f"hidden_act '{config['hidden_act']}' is not supported in the llama family; use silu."
        )
    heads = config["num_attention_heads"]
    bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], DecoderConfig]] = {"llama": _llama}
"""{`model_type` of the Hugging Face configuration: its mapping}."""


def decoder_config(config: dict[str, Any], source: str) -> DecoderConfig:
    """Map a Hugging Face configuration to the decoder's.

    Raises:
        ConversionError: the family is not supported, or the configuration lacks a key.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConversionError(
            f"{source}: model type {family!r} cannot be exported yet; supported are {', '.join(sorted(FAMILIES))}."
        )
    try:
        return FAMILIES[family](config)
    except KeyError as error:
        raise ConversionError(
            f"{source}: its configuration lacks {error.args[0]!r}; palettize the model again."
        ) from error


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
