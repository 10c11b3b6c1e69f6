"""A model that makes one vector of a text: token vectors, pooling, dense layers, norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import read_settings
from edkm_export.decoder.config import ATTENDS, FULL, SLIDING, DecoderConfig
from edkm_export.decoder.context import Context, causal_mask, padding_mask, sliding_mask
from edkm_export.decoder.decoder import Stack
from edkm_export.decoder.embedding.bert import BertSettings
from edkm_export.decoder.embedding.gemma_embedding import GemmaEmbeddingSettings
from edkm_export.decoder.embedding.modernbert import ModernBertSettings
from edkm_export.decoder.embedding.token_pooling import pool
from edkm_export.decoder.families import FAMILIES
from edkm_export.decoder.families.settings import Settings
from edkm_export.decoder.norms import UnitNorm
from edkm_export.embedding_settings import Activation, EmbeddingSettings
from edkm_export.errors import ConversionError

__all__ = ["ENCODERS", "EmbeddingModel", "embedding_config", "empty_embedding_model", "visible_masks"]

ENCODERS: dict[str, type[Settings]] = {
    family.model_type: family for family in (BertSettings, GemmaEmbeddingSettings, ModernBertSettings)
}
"""{`model_type` of the Hugging Face configuration: what reads it}, of models that are no plain decoders."""

_NO_ENCODERS = ("gpt2",)  # its stack has a name of its own

_STACK = "model"  # the checkpoint's name of what gives the token vectors

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class EmbeddingModel(nn.Module):
    """Token ids to token vectors and one vector a text; parameter names are those of the checkpoint.

    Args:
        body: gives token vectors; has a `config`.
        config: of the body.
        settings: of pooling and what follows.
    """

    def __init__(self, body: nn.Module, config: DecoderConfig, settings: EmbeddingSettings) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        self.model = body
        self.dense = nn.ModuleList(
            nn.Linear(layer.in_features, layer.out_features, bias=layer.bias) for layer in settings.dense
        )
        self.unit = UnitNorm() if settings.normalize else nn.Identity()

    @property
    def dimension(self) -> int:
        """Channels of an embedding."""
        return self.settings.dimension(self.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_types: Tensor | None,
        positions: Tensor,
        rotary: dict[str, tuple[Tensor, Tensor]],
        visible: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Token vectors and embeddings.

        Args:
            input_ids: int [batch, tokens].
            attention_mask: int [batch, tokens], 1 for a token, 0 for padding on either side; 2 for a token of the
                prompt where the settings leave it out: others see it, but it is not pooled.
            token_types: int [batch, tokens] where the model has types of tokens; None elsewhere.
            positions: int [1, tokens], 0, 1, 2, ...
            rotary: cos and sin by kind of layer, as in `Context`.
            visible: from `visible_masks`.

        Returns:
            float [batch, tokens, hidden] and [batch, dimension].
        """
        seen = counted = attention_mask
        if not self.settings.include_prompt:
            seen, counted = attention_mask.clamp(max=1), attention_mask.eq(1).to(attention_mask.dtype)
        masks = {kind: mask.minimum(padding_mask(seen).to(mask.dtype)) for kind, mask in visible.items()}
        context = Context(positions, rotary, masks, token_types=token_types)
        vectors: Tensor = self.model(input_ids, context, None)
        x = pool(self.settings.pooling, vectors, counted, positions)
        for layer, settings in zip(self.dense, self.settings.dense, strict=True):
            x = _ACTIVATIONS[settings.activation](layer(x))
        x = self.unit(x)
        return vectors, x.reshape(x.shape[0], self.dimension)


def visible_masks(config: DecoderConfig, positions: Tensor) -> dict[str, Tensor]:
    """What a token may see, padding aside, in each kind of layer.

    Args:
        config: of the model.
        positions: int [1, tokens], 0, 1, 2, ...

    Returns:
        Additive masks, float [1, 1, tokens, tokens]; [1, 1, tokens, 1] where nothing is hidden.
    """
    nothing = (positions * 0).float()[:, None, :, None]
    full = nothing if config.bidirectional else causal_mask(positions, positions)
    masks, window = {FULL: full}, config.sliding_window
    if window is not None:
        masks[SLIDING] = sliding_mask(full, positions, positions, window)
        if config.bidirectional:  # the same seen from the other end
            back = positions * -1
            masks[SLIDING] = sliding_mask(masks[SLIDING], back, back, window)
    return {kind: masks[kind] for kind in sorted(set(config.layer_kinds))}


def embedding_config(config: dict[str, Any], source: str) -> DecoderConfig:
    """Map a Hugging Face configuration to that of an embedding model's token vectors.

    Raises:
        ConversionError: the model type is not supported, or the configuration lacks a key or holds a wrong value.
    """
    found: DecoderConfig = _settings(config, source).decoder_config()
    return found


def empty_embedding_model(checkpoint: Checkpoint) -> EmbeddingModel:
    """The embedding model of a checkpoint without its weights, on the meta device.

    Returns:
        In eval mode; its parameter names are those of the checkpoint.

    Raises:
        ConversionError: the checkpoint holds a language model, or a family that is not supported.
        CheckpointError: a parameter is missing, unknown, or of another shape.
    """
    source = str(checkpoint.path or "checkpoint")
    if checkpoint.embedding is None:
        raise ConversionError(
            f"{source}: holds a language model; --interface embedding is for models that were palettized from a "
            "folder of sentence-transformers (modules.json)."
        )
    settings = _settings(checkpoint.config, source)
    config = settings.decoder_config()
    with torch.device("meta"):
        body = settings.body() if isinstance(settings, (BertSettings, ModernBertSettings)) else Stack(config)
        model = EmbeddingModel(body, config, checkpoint.embedding)
    checkpoint.check_parameters({name: tuple(each.shape) for name, each in model.state_dict().items()})
    return model.eval().requires_grad_(False)


def _settings(config: dict[str, Any], source: str) -> Any:
    """The checked keys of a configuration."""
    known = {name: kind for name, kind in FAMILIES.items() if name not in _NO_ENCODERS} | ENCODERS
    settings = read_settings(config, known, source)
    found = settings.decoder_config()
    if others := sorted(set(found.layer_kinds) - set(ATTENDS)):
        raise ConversionError(
            f"{source}: model type {config['model_type']!r} has layers of the kind {others[0]!r}, whose states would "
            "take in the padding of a batch; embedding models are made of attention alone."
        )
    if found.hidden_size % found.num_heads and isinstance(settings, (BertSettings, ModernBertSettings)):
        raise ConversionError(
            f"{source}: {found.num_heads} heads do not divide hidden_size {found.hidden_size} of its configuration."
        )
    return settings
