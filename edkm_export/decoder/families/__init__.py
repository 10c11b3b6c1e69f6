"""Model families that can be exported: a file and a line here each, see docs/families.md."""

from __future__ import annotations

from edkm_export.decoder.families.cohere2 import Cohere2Settings
from edkm_export.decoder.families.exaone4 import Exaone4Settings
from edkm_export.decoder.families.gemma import Gemma2Settings, Gemma3Settings
from edkm_export.decoder.families.gemma3n import Gemma3nSettings
from edkm_export.decoder.families.gemma4 import Gemma4Settings
from edkm_export.decoder.families.gpt2 import GPT2Settings
from edkm_export.decoder.families.granite import GraniteHybridSettings, GraniteSettings
from edkm_export.decoder.families.hunyuan import HunyuanSettings
from edkm_export.decoder.families.lfm2 import Lfm2Settings
from edkm_export.decoder.families.llama import LlamaSettings
from edkm_export.decoder.families.ministral3 import Ministral3Settings
from edkm_export.decoder.families.mistral import MistralSettings
from edkm_export.decoder.families.olmo import Olmo2Settings, Olmo3Settings
from edkm_export.decoder.families.phi3 import Phi3Settings
from edkm_export.decoder.families.qwen import Qwen2Settings, Qwen3Settings
from edkm_export.decoder.families.qwen3_5 import Qwen35Settings
from edkm_export.decoder.families.settings import Settings
from edkm_export.decoder.families.smollm3 import SmolLM3Settings
from edkm_export.decoder.families.stablelm import StableLmSettings
from edkm_export.decoder.families.starcoder2 import Starcoder2Settings

__all__ = ["FAMILIES"]

FAMILIES: dict[str, type[Settings]] = {
    family.model_type: family
    for family in (
        Cohere2Settings,
        Exaone4Settings,
        Gemma2Settings,
        Gemma3Settings,
        Gemma3nSettings,
        Gemma4Settings,
        GPT2Settings,
        GraniteSettings,
        GraniteHybridSettings,
        HunyuanSettings,
        Lfm2Settings,
        LlamaSettings,
        Ministral3Settings,
        MistralSettings,
        Olmo2Settings,
        Olmo3Settings,
        Phi3Settings,
        Qwen2Settings,
        Qwen3Settings,
        Qwen35Settings,
        SmolLM3Settings,
        StableLmSettings,
        Starcoder2Settings,
    )
}
"""{`model_type` of the Hugging Face configuration: what reads it}, in order."""
