"""What makes an embedding out of a model's token vectors, and how its texts are prepared.

These are the settings that a sentence-transformers folder keeps beside the model (modules.json, 1_Pooling, 2_Dense,
config_sentence_transformers.json). A checkpoint holds them, the reference and the decoder each compute them in their
own way, and an exported folder names them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

__all__ = ["Activation", "DenseSettings", "EmbeddingSettings", "Pooling", "Role"]

Pooling = Literal["mean", "cls", "lasttoken"]
"""Mean of the token vectors, the vector of the first token, or that of the last one."""

Activation = Literal["identity", "tanh", "relu", "gelu", "silu"]
Role = Literal["query", "document"]

# Names of prompts that sentence-transformers looks for (encode_query, encode_document), the first that is there.
_PROMPTS_OF_ROLE: dict[Role, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}

_Size = Annotated[int, pydantic.Field(ge=1, lt=1 << 20)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class DenseSettings(_Strict):
    """A linear layer on the pooled vector.

    Attributes:
        in_features: channels that it reads.
        out_features: channels that it gives.
        bias: it has one.
        activation: on its output.
    """

    in_features: _Size
    out_features: _Size
    bias: bool = True
    activation: Activation = "tanh"


class EmbeddingSettings(_Strict):
    """Pooling, dense layers and normalization of an embedding model, and what is done to a text before.

    Attributes:
        pooling: how one vector is made of many.
        include_prompt: tokens of a prompt are pooled like those of the text.
        dense: layers on the pooled vector, in order.
        normalize: the result is divided by its length.
        max_tokens: longer texts are cut, special tokens included.
        lower_case: texts are lowered first.
        prompts: {name: what is put before a text}.
        default_prompt: name of the one that is used when none is asked for.
    """

    pooling: Pooling
    include_prompt: bool = True
    dense: Annotated[tuple[DenseSettings, ...], pydantic.Field(strict=False)] = ()
    normalize: bool = True
    max_tokens: _Size
    lower_case: bool = False
    prompts: dict[str, str] = {}
    default_prompt: str | None = None

    @pydantic.model_validator(mode="after")
    def _names_a_prompt(self) -> EmbeddingSettings:
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            raise ValueError(
                f"default_prompt is {self.default_prompt!r}, which is none of {list(self.prompts)}"
            )
        return self

    def prompt_for(self, role: Role) -> str:
        """What stands before a text in this role; empty where the model has no prompt for it."""
        named = next((name for name in _PROMPTS_OF_ROLE[role] if name in self.prompts), self.default_prompt)
        return "" if named is None else self.prompts[named]

    def dimension(self, hidden_size: int) -> int:
        """Channels of an embedding of a model with so many channels."""
        return self.dense[-1].out_features if self.dense else hidden_size

    def words(self) -> str:
        """What is done to the token vectors, for people: "mean, 2 dense layers, normalized"."""
        parts = [{"mean": "mean", "cls": "first token", "lasttoken": "last token"}[self.pooling]]
        if not self.include_prompt:
            parts.append("prompts left out")
        if self.dense:
            parts.append(f"{len(self.dense)} dense layer{'s' if len(self.dense) > 1 else ''}")
        parts.append("normalized" if self.normalize else "not normalized")
        return ", ".join(parts)
