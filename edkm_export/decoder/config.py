"""What a decoder is made of: sizes, options, and the names that its family uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FULL", "SLIDING", "DecoderConfig", "Names"]

FULL, SLIDING = "full", "sliding"
"""Kinds of layers: attention over all earlier positions, or over the last `sliding_window`."""


@dataclass(frozen=True)
class Names:
    """Module names of the family's Hugging Face model, which are those of the checkpoint.

    Attributes:
        stack: everything below the output head.
        embedding, layers, final_norm: in the stack.
        positions: table of learned positions in the stack, None with rotary ones.
        attention, mlp: in a layer.
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
class DecoderConfig:
    """Shape and options of a decoder; sizes in elements.

    Attributes:
        max_positions: longest text that the model was made for.
        layer_kinds: FULL or SLIDING for each layer.
        sliding_window: positions that a sliding layer sees, the token's own included.
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
        activation: key of `mlp.ACTIVATIONS`.
        gated: the MLP multiplies its values by an activated gate.
        parallel: attention and MLP read the same normed activations, and both outputs are added.
        attention_scale: factor on the scores; None: one over the root of `head_dim`.
        attention_cap, logit_cap: c in c * tanh(x / c) of scores and logits; None: no cap.
        logit_scale: factor on the logits.
        embedding_scale: factor on the token embeddings.
        output_scale: factor on what attention and MLP add to the residual stream.
        inner_scale: power of two by which the inner activations of the MLP are held smaller than in the Hugging Face
            model, where a norm of its output takes it away again.
        residual_scale: power of two by which the residual stream is held smaller than in the Hugging Face model.
            Norms do not see it; it keeps streams beyond 65,504 inside float16.
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
    inner_scale: float = 1.0
    residual_scale: float = 1.0
    bidirectional: bool = False
    token_types: int = 0
    tied: bool = False
    names: Names = field(default_factory=Names)

    @property
    def num_layers(self) -> int:
        """Layers of attention and MLP."""
        return len(self.layer_kinds)
