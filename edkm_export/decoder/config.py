"""What a decoder is made of: sizes, options, and the names that its family uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "ATTENDS",
    "CONVOLUTION",
    "FULL",
    "LINEAR",
    "SLIDING",
    "AltUp",
    "DecoderConfig",
    "HeadSizes",
    "LayerEmbedding",
    "LinearAttention",
    "Names",
]

FULL, SLIDING = ATTENDS = ("full", "sliding")
"""Kinds of layers: attention over all earlier positions, or over the last `sliding_window`."""

CONVOLUTION, LINEAR = "convolution", "linear"
"""Kinds of layers without attention: a gated short convolution, or linear attention (gated DeltaNet)."""


@dataclass(frozen=True)
class Names:
    """Module names of the family's Hugging Face model, which are those of the checkpoint.

    Attributes:
        stack: everything below the output head.
        embedding, layers, final_norm: in the stack.
        positions: table of learned positions in the stack, None with rotary ones.
        attention, mlp: in a layer.
        convolution, linear: what CONVOLUTION and LINEAR layers have in the place of attention.
        attention_norm, mlp_norm: pre-norms, on their inputs; None: the family has none.
        attention_output_norm, mlp_output_norm: post-norms, on their outputs; None: the family has none.
        attention_inputs: projections to queries, keys and values; a single one makes all three.
        query_norm, key_norm: in attention, of families that have them.
        mlp_inputs: projections to gate and values; a single one makes both.
        attention_output, mlp_output: projections back to the hidden size.
    """

    stack: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    convolution: str = "conv"
    linear: str = "linear_attn"
    attention_norm: str | None = "input_layernorm"
    attention_output_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_output: str = "down_proj"


@dataclass(frozen=True)
class LinearAttention:
    """Sizes of linear attention: each head of keys serves consecutive heads of values."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class HeadSizes:
    """Number of key/value heads of a layer, and channels of a head."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class AltUp:
    """Residual streams of a model with alternating updates (arXiv 2301.13310).

    Attributes:
        streams: number of them.
        active: the one that attention and MLP read.
        scales: the active one is multiplied by a weight of its own before the per-layer embedding is gated by it.
    """

    streams: int
    active: int
    scales: bool


@dataclass(frozen=True)
class LayerEmbedding:
    """Sizes of the table that gives each layer a vector of its own for each token (Gemma's per-layer embedding).

    Attributes:
        rows: tokens that it knows.
        size: channels of the vector of one layer.
    """

    rows: int
    size: int


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder; sizes in elements.

    Attributes:
        max_positions: longest text that the model was made for.
        layer_kinds: FULL, SLIDING, CONVOLUTION or LINEAR for each layer.
        sliding_window: positions that a sliding layer sees, the token's own included.
        full_heads: sizes of the heads of FULL layers, all of whose channels rotate; None: those of the others.
        sharing_layers: so many of the last layers have no keys and values of their own: they use those of the last
            layer before them that has the same kind.
        rotary_dim: channels of a head that rotate; 0: positions are learned.
        rotary_interleaved: pairs of neighbouring channels rotate, instead of the two halves of a head.
        rotary_alpha: stretches the base of the rotation whatever the length of the text (NTK-aware scaling); None: no.
        unrotated: numbers of layers whose queries and keys know no positions.
        query_growth: beta and length L in 1 + beta * log(1 + floor(position / L)), the factor on queries of Llama 4's
            attention temperature; None: no factor.
        norm: root mean square norm, or layer norm.
        norm_bias: layer norms have a bias.
        norm_offset: the norm multiplies by one plus its weight.
        query_key_norm: queries and keys are normalized, all heads with one weight ("head"), all channels of all heads
            together ("whole"), or each head with a layer norm of its own ("apart"); None: they are not.
        query_key_norm_last: after the rotation.
        value_norm: the values of each head are normalized, too, without a weight.
        values_from_keys: FULL layers project no values: theirs are the projected keys, before norm and rotation.
        activation: key of `mlp.ACTIVATIONS`.
        gated: the MLP multiplies its values by an activated gate.
        parallel: attention and MLP read the same normed activations, and both outputs are added.
        attention_scale: factor on the scores; None: one over the root of `head_dim`.
        attention_cap, logit_cap: c in c * tanh(x / c) of scores and logits; None: no cap.
        logit_scale: factor on the logits.
        embedding_scale: factor on the token embeddings.
        output_scale: factor on what attention and MLP add to the residual stream.
        intermediate_sizes: inner channels of the MLP of each layer; empty: all have `intermediate_size`.
        sparsity: part of the gates of each layer's MLP that is zero, if they are normally distributed; empty: none.
        altup: the layers carry several residual streams (AltUp); None: one.
        laurel_rank: channels of a linear path beside attention (LAuReL); 0: there is none.
        layer_scalar: what a layer gives is multiplied by a number of its own.
        layer_embedding: a further input of each layer; None: there is none.
        inner_scale: power of two by which the inner activations of the MLP are held smaller than in the Hugging Face
            model, where a norm of its output takes it away again.
        residual_scale: power of two by which the residual stream is held smaller than in the Hugging Face model.
            Norms do not see it; it keeps streams beyond 65,504 inside float16.
        kernel_size: of the convolutions of CONVOLUTION and LINEAR layers, in tokens.
        convolution_bias: CONVOLUTION layers have biases.
        linear: sizes of LINEAR layers.
        attention_gate: the projection to queries makes a gate for each channel of attention's output, too.
        bidirectional: a token sees later ones, too, in sliding layers as far as earlier ones; only for embeddings.
        token_types: rows of the table of token types; 0: there is none.
        tied: the output head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    layer_kinds: tuple[str, ...]
    sliding_window: int | None = None
    full_heads: HeadSizes | None = None
    sharing_layers: int = 0
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    rotary_alpha: float | None = None
    unrotated: frozenset[int] = frozenset()
    query_growth: tuple[float, float] | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    norm_offset: bool = False
    query_key_norm: Literal["head", "whole", "apart"] | None = None
    query_key_norm_last: bool = False
    value_norm: bool = False
    values_from_keys: bool = False
    activation: str = "silu"
    gated: bool = True
    parallel: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    intermediate_sizes: tuple[int, ...] = ()
    sparsity: tuple[float, ...] = ()
    altup: AltUp | None = None
    laurel_rank: int = 0
    layer_scalar: bool = False
    layer_embedding: LayerEmbedding | None = None
    inner_scale: float = 1.0
    residual_scale: float = 1.0
    kernel_size: int = 0
    convolution_bias: bool = False
    linear: LinearAttention | None = None
    attention_gate: bool = False
    bidirectional: bool = False
    token_types: int = 0
    tied: bool = False
    names: Names = field(default_factory=Names)

    @property
    def num_layers(self) -> int:
        """Layers of attention, or what stands for it, and MLP."""
        return len(self.layer_kinds)

    @property
    def relative_positions(self) -> bool:
        """A text that begins at a later position computes the same.

        Learned positions, and queries that grow with theirs, are counted from the first. Behind the rotation, a norm's
        weights tell channels apart, and scores no longer depend on the distance alone.
        """
        return self.names.positions is None and self.query_growth is None and not self.query_key_norm_last

    def attention_kinds(self, layers: slice = slice(None)) -> list[str]:
        """Kinds of the layers that attend, sorted: those that need masks and positions."""
        return sorted(set(self.layer_kinds[layers]).intersection(ATTENDS))

    def heads_of(self, kind: str) -> HeadSizes:
        """Sizes of the heads of layers of a kind that attends."""
        if kind == FULL and self.full_heads is not None:
            return self.full_heads
        return HeadSizes(self.num_kv_heads, self.head_dim)

    def rotary_of(self, kind: str) -> int:
        """Channels of a head that rotate in layers of a kind that attends."""
        if kind == FULL and self.full_heads is not None and self.rotary_dim:
            return self.full_heads.head_dim
        return self.rotary_dim

    def source_of(self, layer: int) -> int | None:
        """The layer whose keys and values a layer uses; None: it makes its own."""
        own = self.num_layers - self.sharing_layers
        if layer < own:
            return None
        kind = self.layer_kinds[layer]
        return next(each for each in reversed(range(own)) if self.layer_kinds[each] == kind)

    def sources(self) -> set[int]:
        """Layers whose keys and values others use."""
        found = {self.source_of(layer) for layer in range(self.num_layers)}
        return {layer for layer in found if layer is not None}

    def intermediate_of(self, layer: int) -> int:
        """Inner channels of the MLP of a layer."""
        return self.intermediate_sizes[layer] if self.intermediate_sizes else self.intermediate_size

    def sparsity_of(self, layer: int) -> float:
        """Part of the gates of a layer's MLP that is zero."""
        return self.sparsity[layer] if self.sparsity else 0.0
