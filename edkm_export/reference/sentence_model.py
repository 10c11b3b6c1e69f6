"""An embedding model as sentence-transformers computes it: transformers' own model, pooling, dense layers, norm.

Parameter names are `model.` and the name in transformers' model, and `dense.0.weight`, `dense.0.bias` for the layers on
the pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.embedding_settings import EmbeddingSettings, Role

__all__ = ["SentenceModel", "SentenceTokenizer", "base_model_class", "padded"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def base_model_class(config: Any) -> Any:
    """The class of transformers that gives token vectors: `Qwen3Model`, `BertModel`."""
    import transformers

    return transformers.AutoModel._model_mapping[type(config)]


def _build(config: Any, **arguments: Any) -> Any:
    """transformers' model without the pooler of BERT, which sentence-transformers does not use."""
    import transformers

    if config.model_type == "bert":
        return transformers.BertModel._from_config(config, add_pooling_layer=False, **arguments)
    return transformers.AutoModel.from_config(config, **arguments)


class SentenceModel(nn.Module):
    """Token ids to one vector a text.

    Args:
        config: configuration of transformers.
        settings: of pooling and what follows.
        arguments: of `from_config`: dtype, attn_implementation.

    Attributes:
        config: of transformers.
        settings: of pooling and what follows.
        model: gives the token vectors.
        dense: linear layers on the pooled vector.
    """

    def __init__(self, config: Any, settings: EmbeddingSettings, **arguments: Any) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        self.model = _build(config, **arguments)
        self.dense = nn.ModuleList(
            nn.Linear(layer.in_features, layer.out_features, bias=layer.bias) for layer in settings.dense
        )

    def get_input_embeddings(self) -> nn.Module:
        """Table of the tokens."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> None:
        """None: there is no head over the vocabulary."""
        return None

    @property
    def device(self) -> torch.device:
        """Of its parameters."""
        return next(self.parameters()).device

    def token_vectors(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Ids and mask int64 [texts, tokens] -> [texts, tokens, hidden]."""
        given: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if hasattr(self.config, "use_cache"):
            given["use_cache"] = False
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **given)
        return found.last_hidden_state  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        prompt_length: int = 0,
    ) -> Tensor:
        """Embeddings.

        Args:
            input_ids: int64 [texts, tokens].
            attention_mask: int64 [texts, tokens], 1 for a token, 0 for padding on either side.
            token_type_ids: int64 [texts, tokens]; None: zeros.
            prompt_length: first tokens of each text that belong to its prompt; they are left out where the settings
                say so.

        Returns:
            float [texts, dimension].
        """
        vectors = self.token_vectors(input_ids, attention_mask, token_type_ids)
        return self.finish(self.pool(vectors, attention_mask, prompt_length))

    def pool(self, vectors: Tensor, attention_mask: Tensor, prompt_length: int = 0) -> Tensor:
        """One vector of many: [texts, tokens, hidden] -> [texts, hidden]."""
        mask = attention_mask.clone()
        if prompt_length and not self.settings.include_prompt:
            padding = mask.argmax(1, keepdim=True)  # on the left
            mask[torch.arange(mask.shape[1]) < padding + prompt_length] = 0
        rows = torch.arange(len(mask))
        if self.settings.pooling == "cls":
            return vectors[rows, mask.argmax(1)]
        if self.settings.pooling == "lasttoken":
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            return vectors[rows, last] * mask[rows, last, None].to(vectors.dtype)
        weights = mask[..., None].to(vectors.dtype)
        return (vectors * weights).sum(1) / weights.sum(1).clamp(min=1e-9)

    def finish(self, pooled: Tensor) -> Tensor:
        """Dense layers and norm: [texts, hidden] -> [texts, dimension]."""
        for layer, settings in zip(self.dense, self.settings.dense, strict=True):
            pooled = _ACTIVATIONS[settings.activation]()(layer(pooled))
        return F.normalize(pooled, p=2, dim=-1) if self.settings.normalize else pooled


class SentenceTokenizer:
    """Texts to token ids as sentence-transformers makes them: prompt, lower case, special tokens, cut.

    Args:
        tokenizer: of transformers.
        settings: of the model.
        limit: most tokens of a text; None: what the settings say.
    """

    def __init__(self, tokenizer: Any, settings: EmbeddingSettings, limit: int | None = None) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.limit = settings.max_tokens if limit is None else min(limit, settings.max_tokens)

    def encode(self, text: str, role: Role | None = None) -> tuple[Tensor, int]:
        """One text.

        Args:
            text: without its prompt.
            role: whose prompt it gets; None: none.

        Returns:
            Ids int64 [tokens], and how many of the first belong to the prompt.
        """
        prompt = "" if role is None else self._settings.prompt_for(role)
        return self._ids(prompt + text), self._prompt_length(prompt) if prompt else 0

    def framed(self, windows: Tensor) -> Tensor:
        """Pieces of a long text as texts: int64 [windows, tokens] with the special tokens around each row."""
        whole = self._tokenizer("a")["input_ids"]
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        place = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), None)
        if place is None:
            return windows
        sides = [
            torch.tensor(part, dtype=torch.int64) for part in (whole[:place], whole[place + len(bare) :])
        ]
        before, behind = (side.expand(len(windows), -1) for side in sides)
        kept = max(self.limit - sum(map(len, sides)), 1)
        return torch.cat([before, windows[:, :kept], behind], 1)

    def _ids(self, text: str) -> Tensor:
        lowered = text.lower() if self._settings.lower_case else text
        found = self._tokenizer(lowered, truncation=True, max_length=self.limit, return_attention_mask=False)[
            "input_ids"
        ]
        return torch.tensor(found, dtype=torch.int64)

    def _prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt alone, without a special token at its end."""
        ids = self._ids(prompt)
        ends = bool(len(ids)) and int(ids[-1]) in self._tokenizer.all_special_ids
        return len(ids) - ends


def padded(
    texts: Sequence[Tensor], *, left: bool = False, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as one batch.

    Args:
        texts: int64 [tokens] each.
        left: padding stands before the text.
        length: of all after padding; None: that of the longest.

    Returns:
        Ids and mask, int64 [texts, length]; padding has id 0.
    """
    width = max(map(len, texts)) if length is None else length
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask
