"""What a description of an architecture is, and what descriptions of many have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_file import GgufFile
from edkm_export.reference.gguf.gguf_settings import GgufSettings
from edkm_export.reference.gguf.rotary_settings import FREQUENCIES, LONG, SHORT, Rotary, rotary

__all__ = [
    "Architecture",
    "Described",
    "biases",
    "common",
    "has_own_head",
    "layer_norms",
    "no_window",
    "one_width",
    "rms_norms",
    "rotation",
    "slides",
]


@dataclass(frozen=True)
class Described:
    """A model as its file describes it.

    Attributes:
        model_type: of the transformers model that computes the same.
        config: arguments of its `PretrainedConfig`.
        tensors: tensors of the file that went into them.
    """

    model_type: str
    config: dict[str, Any]
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        describe: reads the file's keys.
        interleaved: rows of queries and keys are stored for rotation of neighbouring channels.
        norm_offset: norms are stored with one added to what the transformers model holds.
    """

    describe: Callable[[GgufSettings, GgufFile], Described]
    interleaved: bool = False
    norm_offset: bool = False


def _vocabulary(settings: GgufSettings, file: GgufFile) -> int:
    """Rows of the embedding, which every statement about the vocabulary must agree with."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(f"{file.path}: tensor token_embd.weight is missing.")
    rows = embedding.shape[0]
    if settings.integer("vocab_size", rows) != rows:
        settings.refuse(
            "vocab_size", f"is {settings.integer('vocab_size')}, but token_embd.weight has {rows} rows"
        )
    tokens = settings.raw("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        settings.refuse(
            "tokenizer.ggml.tokens", f"holds {len(tokens)} tokens for {rows} rows of token_embd.weight"
        )
    return rows


def _token_ids(settings: GgufSettings, rows: int) -> dict[str, Any]:
    """Ids of special tokens; the tokens that end a text are a list when there are several."""
    found: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        found[f"{name}_token_id"] = _token_id(settings, key, rows)
    ends = [_token_id(settings, key, rows) for key in ("eos", "eot", "eom")]
    several = list(dict.fromkeys(each for each in ends if each is not None))
    found["eos_token_id"] = several[0] if len(several) == 1 else several or None
    return found


def _token_id(settings: GgufSettings, name: str, rows: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value: int | None = settings.integer(key, None)
    if value is not None and value >= rows:
        if value == 0xFFFFFFFF:  # llama.cpp's "none"
            settings.ignore(key, "says that there is no such token")
        else:
            settings.refuse(key, f"{value} is beyond the vocabulary of {rows}")
        return None
    return value


def common(
    settings: GgufSettings, file: GgufFile, *, kv_heads: int | None = None, scaled: bool = False
) -> dict[str, Any]:
    """What all architectures say in the same words, by the names that most configurations use.

    Args:
        settings: the file's keys.
        file: the file.
        kv_heads: heads of keys and values, where layers differ; None: one number of the file.
        scaled: the caller reads the factors on embeddings, scores, outputs and logits.

    Raises:
        SourceError: a key is missing, or a value makes no sense.
    """
    if settings.integer("expert_count", 0):
        settings.refuse("expert_count", "mixtures of experts are not supported")
    if settings.integer("expert_used_count", 0):
        settings.refuse("expert_used_count", "mixtures of experts are not supported")
    if not settings.flag("attention.causal", True):
        settings.refuse("attention.causal", "a model that sees later tokens is no language model")
    if settings.integer("pooling_type", 0):
        settings.refuse("pooling_type", "a model whose outputs are pooled is no language model")
    for name in () if scaled else ("embedding_scale", "logit_scale", "residual_scale"):
        if settings.number(name, 1.0) != 1.0:
            settings.refuse(name, f"models of architecture {settings.arch} have no such factor")
    rows = _vocabulary(settings, file)
    hidden = settings.integer("embedding_length", low=1)
    heads = settings.integer("attention.head_count", low=1)
    head_dim = settings.integer("attention.key_length", hidden // heads, low=1)
    values = settings.integer("attention.value_length", hidden // heads, low=1)
    if values != head_dim:
        settings.refuse(
            "attention.value_length",
            f"values of {values} channels beside keys of {head_dim} are not supported",
        )
    scale = None if scaled else settings.positive("attention.scale", None)
    if scale is not None and abs(scale * head_dim**0.5 - 1) > 1e-6:
        settings.refuse("attention.scale", f"is {scale}; this architecture counts with 1 / sqrt({head_dim})")
    return {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": settings.integer("feed_forward_length", low=1),
        "num_hidden_layers": settings.integer("block_count", low=1),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or settings.integer("attention.head_count_kv", heads, low=1),
        "head_dim": head_dim,
        "max_position_embeddings": settings.integer("context_length", low=1),
        "tie_word_embeddings": not has_own_head(file),
        **_token_ids(settings, rows),
    }


def has_own_head(file: GgufFile) -> bool:
    """False when there is no output head, or when it is the embedding over again."""
    head, embedding = file.tensors.get("output.weight"), file.tensors["token_embd.weight"]
    if head is None:
        return False
    if (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return True
    step = max(1, (1 << 24) // head.row_bytes)
    return any(
        (head.raw(first, last) != embedding.raw(first, last)).any()
        for first in range(0, head.rows, step)
        for last in [min(first + step, head.rows)]
    )


def rms_norms(settings: GgufSettings) -> dict[str, Any]:
    """Their epsilon."""
    settings.ignore("attention.layer_norm_epsilon", "this architecture has root mean square norms only")
    return {"rms_norm_eps": settings.positive("attention.layer_norm_rms_epsilon")}


def layer_norms(settings: GgufSettings, key: str) -> dict[str, Any]:
    """Their epsilon, by the configuration's key."""
    settings.ignore("attention.layer_norm_rms_epsilon", "this architecture has layer norms only")
    return {key: settings.positive("attention.layer_norm_epsilon")}


def one_width(settings: GgufSettings, config: dict[str, Any]) -> None:
    """Heads that do not fill the hidden size; llama.cpp has no such models of some architectures."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config["head_dim"] * heads != hidden:
        settings.refuse(
            "attention.key_length",
            f"{heads} heads of {config['head_dim']} channels do not make {hidden}, as they do in architecture "
            f"{settings.arch}",
        )


def no_window(settings: GgufSettings, context: int) -> None:
    """A window that llama.cpp does not apply here may only be one that hides nothing."""
    window = settings.integer("attention.sliding_window", None)
    if window and window < context:
        settings.refuse(
            "attention.sliding_window",
            f"is {window} tokens; llama.cpp attends to all {context} in architecture {settings.arch}, so the file "
            "has two readings",
        )


def rotation(
    settings: GgufSettings,
    file: GgufFile,
    config: dict[str, Any],
    *,
    factors: bool = False,
    part: bool = False,
    **options: Any,
) -> Rotary:
    """How queries and keys rotate.

    Args:
        settings: the file's keys.
        file: the file.
        config: from `common`.
        factors: the architecture takes tensors of rotary factors.
        part: it can rotate a part of each head.
        options: of `rotary`.

    Raises:
        SourceError: a value makes no sense.
    """
    taken = {
        name: tensor
        for name, tensor in file.tensors.items()
        if factors and name in (FREQUENCIES, LONG, SHORT)
    }
    found = rotary(
        settings, taken, head_dim=config["head_dim"], context=config["max_position_embeddings"], **options
    )
    if found.dimensions != config["head_dim"] and not part:
        settings.refuse(
            "rope.dimension_count",
            f"heads of {config['head_dim']} channels rotate as a whole in architecture {settings.arch}",
        )
    return found


def biases(file: GgufFile, *names: str, layer: int = 0) -> bool:
    """A module of a layer has a bias."""
    return any(f"blk.{layer}.{name}.bias" in file.tensors for name in names)


def slides(settings: GgufSettings, layers: int, every: int) -> list[str]:
    """Kinds of the layers: one in `every` is full, the last of each run, or as the file lists them."""
    given = settings.raw("attention.sliding_window_pattern")
    if isinstance(given, list):
        if len(given) != layers or not all(isinstance(each, bool) for each in given):
            settings.refuse("attention.sliding_window_pattern", f"is no list of {layers} truths")
            given = [True] * layers
        slides = given
    else:
        period = settings.integer("attention.sliding_window_pattern", every)
        slides = [period == 0 or layer % period < period - 1 for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in slides]
