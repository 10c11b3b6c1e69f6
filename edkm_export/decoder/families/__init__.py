"""Model families that can be exported: a file and a line here each, see docs/families.md."""

from __future__ import annotations

from edkm_export.decoder.families.gemma import Gemma2Settings, Gemma3Settings
from edkm_export.decoder.families.gpt2 import GPT2Settings
from edkm_export.decoder.families.llama import LlamaSettings
from edkm_export.decoder.families.mistral import MistralSettings
from edkm_export.decoder.families.phi3 import Phi3Settings
from edkm_export.decoder.families.qwen import Qwen2Settings, Qwen3Settings
from edkm_export.decoder.families.settings import Settings

__all__ = ["FAMILIES"]

FAMILIES: dict[str, type[Settings]] = {
    family.model_type: family
    for family in (
        Gemma2Settings,
        Gemma3Settings,
        GPT2Settings,
        LlamaSettings,
        MistralSettings,
        Phi3Settings,
        Qwen2Settings,
        Qwen3Settings,
    )
}
"""{`model_type` of the Hugging Face configuration: what reads it}, in order."""
