"""A model's modules and shapes, from its configuration: known before any weight is read."""

from __future__ import annotations

from typing import Any

from edkm_export.errors import EdkmExportError, InputError
from edkm_export.reference.sentence_model import SentenceModel
from edkm_export.reference.source import Source, embedding_settings, load_config

__all__ = ["outline"]


def outline(source: Source) -> Any:
    """The model of transformers on the meta device: names and shapes without values.

    Returns:
        transformers.PreTrainedModel, tied weights are one parameter; a SentenceModel of an embedding model.

    Raises:
        SourceError: a part of the configuration is not understood.
        InputError: it cannot be loaded, or makes no model.
        BackendMissingError: a package that reads this form is not installed.
    """
    settings = embedding_settings(source)
    config = load_config(source)
    import accelerate
    import transformers

    try:
        if settings is not None:
            with accelerate.init_empty_weights():
                return SentenceModel(config, settings)
        with accelerate.init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except EdkmExportError:
        raise
    except Exception as error:  # sizes that do not fit together; what transformers raises has no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{source.reference}: its configuration makes no model ({reason}).") from error
    return model
