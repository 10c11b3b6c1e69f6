"""Hard PyTorch: the Hugging Face model with the decoded weights.

The reference of every export check. It is transformers' own model, never our decoder, so that the two cannot
share a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.config_bounds import check_config
from edkm_export.errors import CheckpointError
from edkm_export.guarded_tokenizer import TokenizerError, open_tokenizer
from edkm_export.library_logs import silence
from edkm_export.reference.config_fields import shaping_fields
from edkm_export.reference.conv1d import as_linear, conv1d_weights
from edkm_export.reference.float_weights import FloatWeights
from edkm_export.reference.sentence_model import SentenceModel
from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.reference.streamed_model import stream

__all__ = ["hard_weights", "load_hard_embedding_model", "load_hard_model", "load_hard_tokenizer"]


@torch.no_grad()
def load_hard_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, room_bytes: int | None = None
) -> Any:
    """Build the model from a checkpoint.

    Args:
        checkpoint: the checkpoint.
        dtype: of the weights.
        room_bytes: decode each layer when it is used, and keep as many as fit in so many bytes, see `streamed_model`;
            None: decode all of them now.

    Returns:
        transformers.PreTrainedModel in eval mode, weights in `dtype`.

    Raises:
        CheckpointError: the configuration is not understood; a parameter is missing, unknown or misshapen.
    """
    weights = hard_weights(checkpoint, dtype)
    model = weights.model
    if room_bytes is not None:
        return stream(model, weights.read, keys=checkpoint.tied, dtype=dtype, room_bytes=room_bytes)
    model.load_state_dict(as_linear(model, checkpoint.state_dict(dtype)), assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def hard_weights(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> FloatWeights:
    """The model without weights, and how to decode each of them.

    Raises:
        CheckpointError: see `load_hard_model`.
    """
    if checkpoint.embedding is not None:
        raise CheckpointError(
            f"{checkpoint.path or 'checkpoint'}: is an embedding model, which continues no text; coreml, onnx, verify "
            "and inspect take it."
        )
    import transformers

    model = _empty(
        checkpoint,
        lambda config: transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=dtype
        ),
    )
    expected = {name: tuple(tensor.shape) for name, tensor in as_linear(model, model.state_dict()).items()}
    checkpoint.check_parameters(expected)
    turned = conv1d_weights(model)

    def read(name: str) -> Tensor:
        value = checkpoint.parameter(name, dtype)
        return value.t().contiguous() if name in turned else value

    reference = str(checkpoint.path or "checkpoint")
    return FloatWeights(reference, model.eval().requires_grad_(False), read, dtype, checkpoint.tied)


@torch.no_grad()
def load_hard_embedding_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> SentenceModel:
    """Build an embedding model from its checkpoint.

    Returns:
        In eval mode, weights in `dtype`.

    Raises:
        CheckpointError: see `load_hard_model`; or it is no embedding model.
    """
    settings = checkpoint.embedding
    if settings is None:
        raise CheckpointError(
            f"{checkpoint.path or 'checkpoint'}: is no embedding model; palettize a folder of sentence-transformers."
        )
    model: SentenceModel = _empty(
        checkpoint,
        lambda config: SentenceModel(config, settings, attn_implementation="eager", dtype=dtype),
    )
    held = {**dict(model.named_parameters()), **stored_buffers(model)}
    checkpoint.check_parameters({name: tuple(each.shape) for name, each in held.items()})
    model.load_state_dict(checkpoint.state_dict(dtype), assign=True)
    return model.eval().requires_grad_(False)


def _empty(checkpoint: Checkpoint, build: Callable[[Any], Any]) -> Any:
    """What `build` makes of the checkpoint's configuration, without weights, but with its constants."""
    import accelerate
    import transformers

    source = str(checkpoint.path or "checkpoint")
    silence("transformers")
    settings = shaping_fields(checkpoint.config, embeds=checkpoint.embedding is not None)
    check_config(settings, source, checkpoint.shapes, CheckpointError)
    try:
        config = transformers.AutoConfig.for_model(**settings)
        with accelerate.init_empty_weights(include_buffers=False):
            return build(config)
    except Exception as error:  # what a configuration that makes no sense raises has no common base
        raise CheckpointError(f"{source}: transformers cannot build its model: {error}") from error


def load_hard_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that is stored in the checkpoint.

    Raises:
        CheckpointError: it holds none, or one that transformers cannot read.
    """
    import tempfile
    from pathlib import Path

    source = str(checkpoint.path or "checkpoint")
    if not checkpoint.tokenizer:
        raise CheckpointError(f"{source}: holds no tokenizer; palettize from a folder that has one.")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in checkpoint.tokenizer.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return open_tokenizer(folder, source)
        except TokenizerError as error:
            raise CheckpointError(str(error)) from error
        except Exception as error:  # likewise for a damaged tokenizer
            raise CheckpointError(f"{source}: its tokenizer cannot be read: {error}") from error
