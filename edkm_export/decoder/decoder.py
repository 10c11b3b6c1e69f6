"""A decoder that exports well: constant RoPE tables, float16-safe norms, names as in Hugging Face's models.

Written for tracing, not for training. One class serves all families, see `config`. Positions, masks and cache are
arguments of the forward pass, so that it serves whole sequences and, with a cache, prompts and single tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from edkm_export.decoder.altup import HALF, AlternatingUpdates, Laurel, add_streams, joined, spread
from edkm_export.decoder.attention import Attention
from edkm_export.decoder.config import CONVOLUTION, LINEAR, DecoderConfig
from edkm_export.decoder.context import Context
from edkm_export.decoder.layer_embedding import LayerInput, add_tables, layer_inputs
from edkm_export.decoder.linear_attention import GatedDeltaNet
from edkm_export.decoder.mlp import MLP
from edkm_export.decoder.norms import build_norm
from edkm_export.decoder.short_convolution import ShortConvolution
from edkm_export.decoder.states import Cache

__all__ = ["Decoder", "Layer", "Stack"]


_MIXERS: dict[str, type[nn.Module]] = {CONVOLUTION: ShortConvolution, LINEAR: GatedDeltaNet}
"""What layers of a kind have in the place of attention: made of a configuration and the layer's number."""


def _mixer_name(config: DecoderConfig, layer: int) -> str:
    names = config.names
    known = {CONVOLUTION: names.convolution, LINEAR: names.linear}
    return known.get(config.layer_kinds[layer], names.attention)


class Layer(LayerInput):
    """Attention, or what stands for it, and MLP, each with a residual connection, and a norm before or after it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.names = names = config.names
        self.parallel, self.output_scale = config.parallel, config.output_scale
        self.mixer = _mixer_name(config, layer)
        self.add_module(self.mixer, _MIXERS.get(config.layer_kinds[layer], Attention)(config, layer))
        self.add_module(names.mlp, MLP(config, layer))
        for name in (names.attention_norm, names.mlp_norm):
            if name is not None:
                self.add_module(name, build_norm(config))
        post = (names.attention_output_norm, names.mlp_output_norm)
        assert config.residual_scale == 1 or all(post), "only a post-norm can bring its output to the scale"
        assert config.inner_scale == 1 or post[1], "only a post-norm takes the scale away"
        for each, inner in zip(post, (1.0, config.inner_scale), strict=True):
            if each is not None:
                self.add_module(each, build_norm(config, post=True, inner=inner))
        self.number = layer if config.layer_embedding is not None else None
        if config.layer_embedding is not None:
            self.add_input(config, config.layer_embedding)
        self.layer_scalar = nn.Parameter(torch.ones(1)) if config.layer_scalar else None

    def forward(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """x [batch, new, hidden] -> [batch, new, hidden]."""
        names = self.names
        normed = self._through(names.attention_norm, x)
        mixed = self._through(self.mixer, normed, context, cache)
        x = x + self._scaled(self._through(names.attention_output_norm, mixed))
        if not self.parallel:
            normed = self._through(names.mlp_norm, x)
        inner = self._through(names.mlp, normed)
        x = x + self._scaled(self._through(names.mlp_output_norm, inner))
        if self.number is not None:
            x = x + self.of_input(x, context.layer_inputs[self.number])
        return x if self.layer_scalar is None else x * self.layer_scalar

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.output_scale == 1 else x * self.output_scale

    def _through(self, name: str | None, x: Tensor, *others: object) -> Tensor:
        return x if name is None else self.get_submodule(name)(x, *others)


class AltUpLayer(Layer):
    """A layer with several residual streams, and a linear path beside attention (Gemma 3n)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.altup is not None and config.laurel_rank and config.layer_embedding is not None
        self.altup = AlternatingUpdates(config, config.altup)
        self.laurel = Laurel(config)

    def forward(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """x [batch, new, streams, hidden] -> the same."""
        names = self.names
        predicted, active = self.altup.predict(x)
        normed = self._through(names.attention_norm, active)
        mixed = self._through(names.attention_output_norm, self._through(self.mixer, normed, context, cache))
        mixed = (active + mixed + self.laurel(normed)) * HALF
        inner = self._through(names.mlp, self._through(names.mlp_norm, mixed))
        computed = mixed + self._through(names.mlp_output_norm, inner)
        corrected, first = self.altup.correct(predicted, active, computed)
        assert self.number is not None
        return self.altup.add(corrected, self.of_input(first, context.layer_inputs[self.number]))


class Stack(nn.Module):
    """Embedding, layers and final norm: the part that Hugging Face calls `model` or `transformer`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, self.names = config, config.names
        names = config.names
        self.embedding_scale = config.embedding_scale * config.residual_scale
        self.add_module(names.embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        if names.positions is not None:
            self.add_module(names.positions, nn.Embedding(config.max_positions, config.hidden_size))
        kind = Layer if config.altup is None else AltUpLayer
        self.add_module(names.layers, nn.ModuleList(kind(config, i) for i in range(config.num_layers)))
        self.add_module(names.final_norm, build_norm(config))
        if config.layer_embedding is not None:
            add_tables(self, config, config.layer_embedding)
        if config.altup is not None:
            add_streams(self, config, config.altup)

    def forward(self, input_ids: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """input_ids [batch, new] -> [batch, new, hidden]."""
        x = self.embed(input_ids, context)
        x = self.through(x, self.with_layer_inputs(context, input_ids, x), cache)
        return self.get_submodule(self.names.final_norm)(x)  # type: ignore[no-any-return]

    def embed(self, input_ids: Tensor, context: Context) -> Tensor:
        """What the first layer reads: input_ids [batch, new] -> [batch, new, hidden]."""
        x = self.get_submodule(self.names.embedding)(input_ids)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.names.positions is not None:
            x = x + self.get_submodule(self.names.positions)(context.position_ids)
        return x  # type: ignore[no-any-return]

    def with_layer_inputs(self, context: Context, input_ids: Tensor, embedded: Tensor) -> Context:
        """A context with what each layer reads of the tokens, in models that have a per-layer embedding.

        Args:
            context: of the tokens.
            input_ids: int [batch, new].
            embedded: from `embed`, [batch, new, hidden].
        """
        sizes = self.config.layer_embedding
        if sizes is None:
            return context
        return replace(context, layer_inputs=layer_inputs(self, self.config, sizes, input_ids, embedded))

    def through(
        self, x: Tensor, context: Context, cache: Cache | None, first: int = 0, end: int | None = None
    ) -> Tensor:
        """Layers `first` to `end`, exclusive: x [batch, new, hidden] -> [batch, new, hidden]."""
        # the axis of the heads, once for all layers
        rotary = {kind: (cos.unsqueeze(1), sin.unsqueeze(1)) for kind, (cos, sin) in context.rotary.items()}
        context = replace(context, rotary=rotary, lent={})
        if self.config.altup is not None:
            x = spread(self, x)
        for layer in list(self.get_submodule(self.names.layers).children())[first:end]:
            x = layer(x, context, cache)
        return x if self.config.altup is None else joined(self, x)


class Decoder(nn.Module):
    """A causal language model whose parameter names are those of the family's Hugging Face model."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.add_module(config.names.stack, Stack(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    @property
    def stack(self) -> nn.Module:
        """Everything below the output head."""
        return self.get_submodule(self.config.names.stack)

    @property
    def embedding(self) -> nn.Module:
        """Of the tokens."""
        return self.stack.get_submodule(self.config.names.embedding)

    def tie(self) -> None:
        """Make the output head the embedding again, after weights were assigned, where the family ties them."""
        if self.config.tied:
            self.lm_head.weight = self.embedding.weight  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        """Logits of every new position.

        Args:
            input_ids: int [batch, new].
            context: positions and masks.
            cache: None: the new positions are all there are.

        Returns:
            float [batch, new, vocab_size].
        """
        return self.head(self.stack(input_ids, context, cache))

    def head(self, x: Tensor) -> Tensor:
        """Logits of normed activations: [batch, new, hidden] -> [batch, new, vocab_size]."""
        logits: Tensor = self.lm_head(x)
        cap, scale = self.config.logit_cap, self.config.logit_scale
        if scale != 1:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits * (1 / cap)) * cap
