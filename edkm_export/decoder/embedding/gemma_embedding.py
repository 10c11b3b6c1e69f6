"""EmbeddingGemma: the text model of Gemma 3, whose tokens may see later ones."""

from __future__ import annotations

from dataclasses import replace

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.families.gemma import Gemma3Settings

__all__ = ["GemmaEmbeddingSettings"]


class GemmaEmbeddingSettings(Gemma3Settings):
    """As `gemma3_text`; with `use_bidirectional_attention` every token sees all others, in sliding layers half of the
    window on each side.
    """

    models = "EmbeddingGemma"

    use_bidirectional_attention: bool | None = None  # type: ignore[assignment]

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config = super().decoder_config()
        if not self.use_bidirectional_attention:
            return config
        # transformers halves the window of the file: a token sees those that are less far away
        window = None if config.sliding_window is None else config.sliding_window // 2 + 1
        return replace(config, bidirectional=True, sliding_window=window)
