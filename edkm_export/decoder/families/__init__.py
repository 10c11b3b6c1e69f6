"""Model families that can be exported: one file and one row each, see docs/families.md."""

from __future__ import annotations

from edkm_export.decoder.families.gemma import Gemma2Settings, Gemma3Settings
from edkm_export.decoder.families.gpt2 import GPT2Settings
from edkm_export.decoder.families.lfm2 import Lfm2Settings
from edkm_export.decoder.families.llama import LlamaSettings
from edkm_export.decoder.families.mistral import MistralSettings
from edkm_export.decoder.families.phi3 import Phi3Settings
from edkm_export.decoder.families.qwen import Qwen2Settings, Qwen3Settings
from edkm_export.decoder.families.qwen3_5 import Qwen35Settings
from edkm_export.decoder.families.settings import Settings

__all__ = ["FAMILIES"]

FAMILIES: dict[str, type[Settings]] = {
    "gemma2": Gemma2Settings,
    "gemma3_text": Gemma3Settings,
    "gpt2": GPT2Settings,
    "lfm2": Lfm2Settings,
    "llama": LlamaSettings,
    "mistral": MistralSettings,
    "phi3": Phi3Settings,
    "qwen2": Qwen2Settings,
    "qwen3": Qwen3Settings,
    "qwen3_5_text": Qwen35Settings,
}
"""{`model_type` of the Hugging Face configuration: what reads it}."""
