"""Small random Llamas of odd shapes, for tests that need many architectures and no training.

`build("gqa_4")` gives a model, `inject_outliers` gives it the extremes of a large trained model, and `save`
writes a whole Hugging Face folder. Norm weights and biases are random too: with the usual ones and zeros, a
converter that forgot them would pass.
"""

from __future__ import annotations

import math
from itertools import islice, product
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["CASES", "build", "build_tokenizer", "inject_outliers", "save"]

END_OF_TEXT = "<|endoftext|>"

_BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_DIFFERENCES: dict[str, dict[str, Any]] = {
    "plain": {},
    # query heads that share a key/value head
    "gqa_1": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
    "gqa_2": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
    "gqa_4": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2},
    "gqa_8": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1},
    "gqa_3_of_9_heads": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    # head sizes; the rotation needs an even one
    "head_dim_above_hidden": {"head_dim": 24},
    "head_dim_below_hidden": {"head_dim": 4},
    "head_dim_6": {"hidden_size": 24},
    "head_dim_10": {"hidden_size": 40},
    "head_dim_14": {"hidden_size": 56},
    "one_head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    # sizes
    "one_layer": {"num_hidden_layers": 1},
    "hidden_not_16": {"hidden_size": 36, "head_dim": 10, "intermediate_size": 72},
    "odd_sizes": {
        "vocab_size": 331,
        "hidden_size": 27,
        "intermediate_size": 37,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
    },
    "vocab_257": {"vocab_size": 257},
    "vocab_1001": {"vocab_size": 1001},
    # head and biases
    "untied": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "untied_and_biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    # position embeddings
    "rope_theta": _rope("default", rope_theta=500000.0),
    "rope_linear": _rope("linear", factor=4.0),
    "rope_dynamic": _rope("dynamic", factor=2.0),
    "rope_llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "rope_yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=32),
}

CASES: dict[str, dict[str, Any]] = {case: {**_BASE, **changes} for case, changes in _DIFFERENCES.items()}
"""Arguments of `LlamaConfig` by name of the case."""


def build(case: str, seed: int = 0) -> LlamaForCausalLM:
    """A random model of a case of `CASES`: float32, in eval mode, the same for the same seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # a copy, since a config completes its RoPE parameters in place
        arguments = {**CASES[case], "rope_parameters": dict(CASES[case]["rope_parameters"])}
        # unit gain, so that each layer matters to the logits; the usual 0.02 is for hidden sizes of thousands
        deviation = 1 / math.sqrt(arguments["hidden_size"])
        model = LlamaForCausalLM(LlamaConfig(**arguments, initializer_range=deviation))
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.float().eval()


def inject_outliers(
    model: LlamaForCausalLM,
    *,
    channel: int = 3,
    norm_scale: float = 300.0,
    weights: int = 2,
    deviations: float = 50.0,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Give a random model, in place, the extremes that large trained ones have; returns it.

    - A few weights of each linear layer become huge, which wastes centroids on them.
    - Three of them line up in the first MLP, so that some tokens get a residual stream whose square overflows
      float16 (|x| >= 256) though x does not: a norm that squares in float16 makes zeros of such a token.
    - A channel of the first norm grows and the weights that read it shrink alike. The function stays the
      same, but a small error of those weights now meets a large activation.

    Args:
        model: a model of `build`.
        channel: the hidden channel that carries the large activations.
        norm_scale: factor on the norm weight of that channel.
        weights: weights of each linear layer, at random places, that become outliers.
        deviations: their magnitude, in standard deviations of the layer's weights.
        seed: of the places and signs.
    """
    generator = torch.Generator().manual_seed(seed)
    first = model.model.layers[0]
    attention, mlp = first.self_attn, first.mlp
    with torch.no_grad():
        sizes = {}
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    flat = module.weight.view(-1)
                    sizes[module] = deviations * float(flat.std())
                    places = torch.randperm(flat.numel(), generator=generator)[:weights]
                    signs = torch.randint(0, 2, (weights,), generator=generator) * 2 - 1
                    flat[places] = signs * sizes[module]
        first.post_attention_layernorm.weight[channel] = 1.5  # the most that `build` gives: overflow needs it
        mlp.gate_proj.weight[0, channel] = sizes[mlp.gate_proj]
        mlp.up_proj.weight[0, channel] = sizes[mlp.up_proj]
        mlp.down_proj.weight[channel, 0] = sizes[mlp.down_proj]
        first.input_layernorm.weight[channel] *= norm_scale
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            reader.weight[:, channel] /= norm_scale
    return model


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of exactly `vocab_size` entries: the bytes, then pairs of letters.

    Raises:
        ValueError: `vocab_size` has no room for the bytes, or asks for more pairs than there are.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(islice(product(ascii_letters, ascii_letters), max(vocab_size - 1 - len(alphabet), 0)))
    entries = [END_OF_TEXT, *alphabet, *map("".join, pairs)]
    if len(entries) != vocab_size:
        raise ValueError(f"vocab_size {vocab_size}: a trivial vocabulary has 257 to 2961 entries.")
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def save(model: LlamaForCausalLM, folder: Path | str) -> Path:
    """Write config, weights and a trivial tokenizer as a Hugging Face folder; returns the folder."""
    folder = Path(folder)
    model.save_pretrained(folder)
    build_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder
