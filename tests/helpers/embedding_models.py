"""Small embedding models in the layout of sentence-transformers, one for each kind and odd cases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from edkm_export.artifact.encodings import TextTokens
from edkm_export.checkpoint import Checkpoint
from edkm_export.embedding_settings import Role
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.sentence_model import SentenceModel, SentenceTokenizer
from edkm_export.reference.source import Source, load_embedding_model, load_tokenizer
from edkm_export.reference.tokenizer_files import embedding_tokenizer_files
from tests.helpers.odd_models import build_tokenizer

__all__ = [
    "CASES",
    "SENTENCES",
    "EmbeddingCase",
    "base_model",
    "edited",
    "palettized",
    "texts_of",
    "write_folder",
]

VOCABULARY = 300

SENTENCES = (
    "a small boat",
    "b",
    "the storm of the night before had left the harbour full of broken planks and nets",
    "Warm bread.",
)


@dataclass(frozen=True)
class EmbeddingCase:
    """One folder.

    Attributes:
        config: class of the configuration in transformers.
        settings: its fields.
        pooling: fields of 1_Pooling/config.json beside the size.
        dense: (outputs, bias, activation class) of each dense layer.
        normalize: there is a Normalize module.
        prompts: of config_sentence_transformers.json.
        default_prompt: name of one of them.
        max_seq_length: of sentence_bert_config.json.
        left: the tokenizer pads on the left.
    """

    config: str
    settings: dict[str, Any]
    pooling: dict[str, Any] = field(default_factory=lambda: {"pooling_mode_mean_tokens": True})
    dense: Sequence[tuple[int, bool, str]] = ()
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_seq_length: int | None = 48
    left: bool = False


_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
_MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 96,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
    "use_bidirectional_attention": True,
}
_QWEN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "tie_word_embeddings": True,
}
_TANH, _IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
_LAST = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
_CLS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}

CASES: dict[str, EmbeddingCase] = {
    "minilm": EmbeddingCase("BertConfig", _BERT),
    "bge": EmbeddingCase(
        "BertConfig", {**_BERT, "type_vocab_size": 1}, pooling=_CLS, prompts={"query": "search: "}
    ),
    "e5": EmbeddingCase(
        "BertConfig",
        {**_BERT, "hidden_act": "gelu_new"},
        prompts={"query": "query: ", "passage": "passage: "},
    ),
    "embeddinggemma": EmbeddingCase(
        "Gemma3TextConfig",
        _GEMMA,
        dense=((80, False, _IDENTITY), (40, False, _IDENTITY)),
        prompts={"query": "task: search | query: ", "document": "title: none | text: "},
    ),
    "gemma even window": EmbeddingCase("Gemma3TextConfig", {**_GEMMA, "sliding_window": 8}, left=True),
    "gemma causal": EmbeddingCase("Gemma3TextConfig", {**_GEMMA, "use_bidirectional_attention": False}),
    "qwen3": EmbeddingCase(
        "Qwen3Config",
        _QWEN,
        pooling=_LAST,
        left=True,
        prompts={"query": "Instruct: find\nQuery:", "document": ""},
    ),
    "qwen3 cls": EmbeddingCase("Qwen3Config", {**_QWEN, "num_key_value_heads": 1}, pooling=_CLS, left=True),
    "modernbert": EmbeddingCase("ModernBertConfig", _MODERN, pooling=_CLS),
    "modernbert biases": EmbeddingCase(
        "ModernBertConfig",
        {**_MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True, "local_attention": 5},
    ),
    "dense tanh": EmbeddingCase(
        "BertConfig", _BERT, dense=((24, True, _TANH), (17, True, "torch.nn.modules.activation.GELU"))
    ),
    "not normalized": EmbeddingCase("BertConfig", _BERT, dense=((24, True, _TANH),), normalize=False),
    "without prompt": EmbeddingCase(
        "BertConfig",
        _BERT,
        pooling={"pooling_mode": "mean", "include_prompt": False},
        prompts={"query": "query: ", "document": "text: "},
        default_prompt="document",
    ),
    "without prompt cls": EmbeddingCase(
        "Qwen3Config",
        _QWEN,
        pooling={"pooling_mode": "cls", "include_prompt": False},
        prompts={"query": "query: "},
        left=True,
    ),
}


def base_model(case: EmbeddingCase, seed: int = 0) -> Any:
    """transformers' model with weights that make texts differ, in float32."""
    torch.manual_seed(seed)
    config = getattr(transformers, case.config)(**case.settings)
    model = transformers.AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        wide = parameter.dim() > 1
        parameter.data.normal_(0 if wide or "norm" not in name.lower() else 1, 0.15 if wide else 0.1)
    return model.eval()


def tokenizer(case: EmbeddingCase) -> PreTrainedTokenizerFast:
    """Bytes, with a token before and one behind each text."""
    made = build_tokenizer(VOCABULARY)
    made.padding_side = "left" if case.left else "right"
    begin, end = made.convert_ids_to_tokens([VOCABULARY - 2, VOCABULARY - 1])
    made.add_special_tokens(
        {"cls_token": begin, "sep_token": end, "pad_token": made.convert_ids_to_tokens(0)}
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, VOCABULARY - 2), (end, VOCABULARY - 1)]
    )
    return made


def write_folder(case: EmbeddingCase, folder: Path, seed: int = 0) -> Path:
    """The folder as sentence-transformers saves it; returns it."""
    model = base_model(case, seed)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer(case).save_pretrained(folder)
    edited(folder, "tokenizer_config.json", padding_side="left" if case.left else "right")
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kinds += [(f"{2 + number}_Dense", "Dense") for number in range(len(case.dense))]
    kinds += [(f"{2 + len(case.dense)}_Normalize", "Normalize")] if case.normalize else []
    modules = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (path, kind) in enumerate(kinds)
    ]
    width = int(case.settings["hidden_size"])
    texts = {"max_seq_length": case.max_seq_length, "do_lower_case": False}
    documents: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": texts,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **case.pooling},
        "config_sentence_transformers.json": {
            "prompts": case.prompts,
            "default_prompt_name": case.default_prompt,
            "similarity_fn_name": "cosine",
        },
    }
    for number, (outputs, bias, activation) in enumerate(case.dense):
        place = f"{2 + number}_Dense"
        documents[f"{place}/config.json"] = {
            "in_features": width,
            "out_features": outputs,
            "bias": bias,
            "activation_function": activation,
        }
        (folder / place).mkdir()
        weights = {"linear.weight": torch.randn(outputs, width) * 0.2}
        weights |= {"linear.bias": torch.randn(outputs) * 0.1} if bias else {}
        save_file(weights, folder / place / "model.safetensors")
        width = outputs
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


def edited(folder: Path, file: str, **changes: Any) -> None:
    """Change fields of a JSON object in a folder; None takes one out."""
    path = folder / file
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def palettized(folder: Path, bits: int = 4, lut_dtype: Any = "float16", group_size: int = 16) -> Checkpoint:
    """The model of a folder, palettized without calibration."""
    source = Source.parse(folder)
    model: SentenceModel = load_embedding_model(source)
    config = model.config.to_dict()
    recipe = uniform_recipe(bits, group_size, lut_dtype, fit_groups=True)
    parts = palettize_model(model, recipe, source=str(folder))
    return Checkpoint(
        config=config,
        palettized=parts.palettized,
        dense=parts.dense,
        tied=parts.tied,
        tokenizer=embedding_tokenizer_files(load_tokenizer(source), model.settings.max_tokens),
        recipe=recipe.model_dump(mode="json"),
        embedding=model.settings,
    )


def texts_of(
    folder: Path, model: SentenceModel, role: Role | None = "query", limit: int | None = None
) -> list[TextTokens]:
    """`SENTENCES` as token ids, with the prompt of a role."""
    tokens = SentenceTokenizer(load_tokenizer(Source.parse(folder)), model.settings, limit)
    encoded = [tokens.encode(text, role) for text in SENTENCES]
    return [TextTokens(ids, 0 if model.settings.include_prompt else prompt) for ids, prompt in encoded]
