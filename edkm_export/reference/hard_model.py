"""Hard PyTorch: the Hugging Face model with the decoded weights.

The reference of every export check. It is transformers' own model, never our decoder, so that the two cannot
share a mistake.
"""

from __future__ import annotations

from typing import Any

import torch

from edkm_export.checkpoint import Checkpoint
from edkm_export.config_bounds import check_config
from edkm_export.errors import CheckpointError
from edkm_export.guarded_tokenizer import TokenizerError, open_tokenizer
from edkm_export.library_logs import silence
from edkm_export.reference.conv1d import as_linear

__all__ = ["load_hard_model", "load_hard_tokenizer"]


@torch.no_grad()
def load_hard_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """Build the model from a checkpoint.

    Returns:
        transformers.PreTrainedModel in eval mode, weights in `dtype`.

    Raises:
        CheckpointError: the configuration is not understood; a parameter is missing, unknown or misshapen.
    """
    import accelerate
    import transformers

    source = str(checkpoint.path or "checkpoint")
    silence("transformers")
    settings = {key: value for key, value in checkpoint.config.items() if key != "dtype"}
    check_config(settings, source, checkpoint.shapes, CheckpointError)
    try:
        config = transformers.AutoConfig.for_model(**settings)
        with accelerate.init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=dtype
            )
    except Exception as error:  # what a configuration that makes no sense raises has no common base
        raise CheckpointError(f"{source}: transformers cannot build its model: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in as_linear(model, model.state_dict()).items()}
    checkpoint.check_parameters(expected)
    model.load_state_dict(as_linear(model, checkpoint.state_dict(dtype)), assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


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
