"""The files by which sentence-transformers finds its way in a folder, written from our settings.

Formats as sentence-transformers 2 to 6 read them.
"""

from __future__ import annotations

from typing import Any

from edkm_export.embedding_settings import EmbeddingSettings

__all__ = ["sentence_documents"]

_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def sentence_documents(settings: EmbeddingSettings, hidden_size: int) -> dict[str, Any]:
    """JSON documents by their path in the folder.

    The prompts are always there. The modules are left out where there are dense layers: their weights are in the
    exported model, and a folder that named them would ask for a second copy.

    Args:
        settings: of the model.
        hidden_size: channels of its token vectors.
    """
    texts = {"max_seq_length": settings.max_tokens, "do_lower_case": settings.lower_case}
    found: dict[str, Any] = {
        "sentence_bert_config.json": texts,
        "config_sentence_transformers.json": {
            "__version__": {},
            "prompts": settings.prompts,
            "default_prompt_name": settings.default_prompt,
            "similarity_fn_name": "cosine",
        },
    }
    if settings.dense:
        return found
    pooling = {flag: mode == settings.pooling for mode, flag in _FLAGS.items()}
    found["1_Pooling/config.json"] = {
        "word_embedding_dimension": hidden_size,
        "include_prompt": settings.include_prompt,
        **pooling,
    }
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kinds += [("2_Normalize", "Normalize")] if settings.normalize else []
    found["modules.json"] = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (path, kind) in enumerate(kinds)
    ]
    return found
