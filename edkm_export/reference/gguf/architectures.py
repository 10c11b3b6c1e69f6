"""Which configuration of transformers a file describes, architecture by architecture.

What a key means, and what holds when it is missing, is llama.cpp's to say: the files were made for it. Where
llama.cpp passes over a key of an architecture, and the key says something else, the file has two readings and is
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_file import GgufFile
from edkm_export.reference.gguf.gguf_settings import GgufSettings
from edkm_export.reference.gguf.rotary_settings import FREQUENCIES, LONG, SHORT, Rotary, rotary

__all__ = ["ARCHITECTURES", "Architecture", "Described"]

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


@dataclass(frozen=True)
class Described:
    """A model as its file describes it.

    Attributes:
        config: arguments of the `PretrainedConfig` of its `model_type`.
        tensors: tensors of the file that went into them.
    """

    config: dict[str, Any]
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        model_type: of the transformers model that computes the same.
        describe: reads the file's keys.
        factors: it takes tensors of rotary factors.
        interleaved: rows of queries and keys are stored for rotation of neighbouring channels.
        norm_offset: norms are stored with one added to what the transformers model holds.
    """

    model_type: str
    describe: Callable[[GgufSettings, GgufFile], Described]
    factors: bool = False
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


def _common(settings: GgufSettings, file: GgufFile) -> dict[str, Any]:
    """What all architectures say in the same words, by the names that most configurations use."""
    if settings.integer("expert_count", 0):
        settings.refuse("expert_count", "mixtures of experts are not supported")
    if settings.integer("expert_used_count", 0):
        settings.refuse("expert_used_count", "mixtures of experts are not supported")
    if not settings.flag("attention.causal", True):
        settings.refuse("attention.causal", "a model that sees later tokens is no language model")
    if settings.integer("pooling_type", 0):
        settings.refuse("pooling_type", "a model whose outputs are pooled is no language model")
    for name in ("embedding_scale", "logit_scale", "residual_scale"):
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
    scale = settings.positive("attention.scale", None)
    if scale is not None and abs(scale * head_dim**0.5 - 1) > 1e-6:
        settings.refuse("attention.scale", f"is {scale}; this architecture counts with 1 / sqrt({head_dim})")
    return {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": settings.integer("feed_forward_length", low=1),
        "num_hidden_layers": settings.integer("block_count", low=1),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads, low=1),
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


def _rms_norms(settings: GgufSettings) -> dict[str, Any]:
    settings.ignore("attention.layer_norm_epsilon", "this architecture has root mean square norms only")
    return {"rms_norm_eps": settings.positive("attention.layer_norm_rms_epsilon")}


def _no_window(settings: GgufSettings, context: int) -> None:
    """A window that llama.cpp does not apply here may only be one that hides nothing."""
    window = settings.integer("attention.sliding_window", None)
    if window and window < context:
        settings.refuse(
            "attention.sliding_window",
            f"is {window} tokens; llama.cpp attends to all {context} in architecture {settings.arch}, so the file "
            "has two readings",
        )


def _rotary(settings: GgufSettings, file: GgufFile, config: dict[str, Any], **options: Any) -> Rotary:
    """Rotation of whole heads, which these models cannot do in part."""
    taken = {
        name: tensor
        for name, tensor in file.tensors.items()
        if name in (FREQUENCIES, LONG, SHORT) and ARCHITECTURES[settings.arch].factors
    }
    found = rotary(
        settings, taken, head_dim=config["head_dim"], context=config["max_position_embeddings"], **options
    )
    if found.dimensions != config["head_dim"] and settings.arch != "phi3":
        settings.refuse(
            "rope.dimension_count",
            f"heads of {config['head_dim']} channels rotate as a whole in architecture {settings.arch}",
        )
    return found


def _biases(file: GgufFile, *names: str) -> bool:
    return any(f"blk.0.{name}.bias" in file.tensors for name in names)


def _llama(settings: GgufSettings, file: GgufFile) -> Described:
    config = _common(settings, file) | _rms_norms(settings)
    _no_window(settings, config["max_position_embeddings"])
    newer = settings.arch == "mistral3"
    if newer and settings.number("attention.temperature_scale", 0.0):
        settings.refuse(
            "attention.temperature_scale", "a scale that grows with the position is not supported"
        )
    found = _rotary(settings, file, config, log_multiplier=newer)
    config["rope_parameters"] = found.parameters
    config["attention_bias"] = _biases(file, "attn_q", "attn_k", "attn_v", "attn_output")
    config["mlp_bias"] = _biases(file, "ffn_gate", "ffn_up", "ffn_down")
    return Described(config, found.tensors)


def _qwen(settings: GgufSettings, file: GgufFile) -> Described:
    config = _common(settings, file) | _rms_norms(settings)
    _no_window(settings, config["max_position_embeddings"])
    found = _rotary(settings, file, config)
    config |= {"rope_parameters": found.parameters, "use_sliding_window": False, "sliding_window": None}
    if settings.arch == "qwen3":
        config["attention_bias"] = _biases(file, "attn_q", "attn_k", "attn_v", "attn_output")
    return Described(config, found.tensors)


def _phi3(settings: GgufSettings, file: GgufFile) -> Described:
    """The window is the model's own. llama.cpp leaves it out and warns that this is not the model."""
    config = _common(settings, file) | _rms_norms(settings)
    found = _rotary(settings, file, config)
    config["rope_parameters"] = found.parameters
    config["original_max_position_embeddings"] = settings.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"], low=1
    )
    config["sliding_window"] = settings.integer("attention.sliding_window", 0) or None
    return Described(config, found.tensors)


def _gpt2(settings: GgufSettings, file: GgufFile) -> Described:
    common = _common(settings, file)
    heads, hidden = common["num_attention_heads"], common["hidden_size"]
    if common["num_key_value_heads"] != heads:
        settings.refuse("attention.head_count_kv", "this architecture has as many of keys as of queries")
    if common["head_dim"] * heads != hidden:
        settings.refuse("attention.key_length", f"{heads} heads of it do not make {hidden} channels")
    return Described(
        {
            "vocab_size": common["vocab_size"],
            "n_positions": common["max_position_embeddings"],
            "n_embd": hidden,
            "n_layer": common["num_hidden_layers"],
            "n_head": heads,
            "n_inner": common["intermediate_size"],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": settings.positive("attention.layer_norm_epsilon"),
            **{name: common[name] for name in common if name.endswith("_token_id")},
            "tie_word_embeddings": common["tie_word_embeddings"],
        }
    )


def _slides(settings: GgufSettings, layers: int, every: int) -> list[str]:
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


def _gemma(settings: GgufSettings, file: GgufFile, layers_27b: int) -> dict[str, Any]:
    """What both generations share. The scale of queries has no key: llama.cpp knows the 27B by its layers."""
    config = _common(settings, file) | _rms_norms(settings)
    largest = config["num_hidden_layers"] == layers_27b
    width = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return config | {"query_pre_attn_scalar": width, "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(settings: GgufSettings, file: GgufFile) -> Described:
    config = _gemma(settings, file, _GEMMA2_27B_LAYERS)
    found = _rotary(settings, file, config)
    same = settings.positive("rope.freq_base_swa", found.parameters["rope_theta"])
    if same != found.parameters["rope_theta"]:
        settings.refuse("rope.freq_base_swa", "another base for sliding layers is not supported in gemma2")
    config |= {
        "rope_parameters": found.parameters,
        "attn_logit_softcapping": settings.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.positive("final_logit_softcapping", 30.0),
        "sliding_window": settings.integer("attention.sliding_window", 4096, low=1),
        "layer_types": _slides(settings, config["num_hidden_layers"], 2),
    }
    return Described(config, found.tensors)


def _gemma3(settings: GgufSettings, file: GgufFile) -> Described:
    config = _gemma(settings, file, _GEMMA3_27B_LAYERS)
    layers = config["num_hidden_layers"]
    found = _rotary(settings, file, config)
    if found.parameters["rope_type"] not in ("default", "linear"):
        settings.refuse("rope.scaling.type", "only a linear scaling is supported in gemma3")
    sliding = {"rope_type": "default", "rope_theta": settings.positive("rope.freq_base_swa", 10000.0)}
    window = settings.integer("attention.sliding_window", 0)
    kinds = _slides(settings, layers, 6) if window else ["full_attention"] * layers
    if not window:
        settings.ignore("rope.freq_base_swa", "no layer slides")
        settings.ignore("attention.sliding_window_pattern", "no layer slides")
    config |= {
        "rope_parameters": {"full_attention": found.parameters, "sliding_attention": sliding},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": settings.positive("final_logit_softcapping", None),
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": kinds,
    }
    return Described(config, found.tensors)


ARCHITECTURES = {
    "gemma2": Architecture("gemma2", _gemma2, norm_offset=True),
    "gemma3": Architecture("gemma3_text", _gemma3, norm_offset=True),
    "gpt2": Architecture("gpt2", _gpt2),
    "llama": Architecture("llama", _llama, factors=True, interleaved=True),
    "mistral3": Architecture("llama", _llama, factors=True, interleaved=True),
    "phi3": Architecture("phi3", _phi3, factors=True),
    "qwen2": Architecture("qwen2", _qwen),
    "qwen3": Architecture("qwen3", _qwen),
}
"""{name in the file: what is known of it}."""
