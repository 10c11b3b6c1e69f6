"""Which stored tensor is which parameter of the model, and what is left over on either side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.reference.stored_tensors import StoredTensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONSTANTS", "Placement"]

_PREFIXES = ("model.", "transformer.")  # a stack that was saved without its head lacks it
_ENCODER = "bert."  # of a BERT that was saved with a head
_ROTATIONS = "rotary_emb.inv_freq"
_MASKS = (".attn.bias", ".attn.masked_bias")
_CONSTANT = "a constant that older versions saved; it is what the configuration gives"
_ROWS = 4096  # compared at a time

# Gemma 3n and 4 store these for layers that share keys and values, too
_SHARED = re.compile(r"(?:^|\.)layers\.\d{1,4}\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.weight$")

CONSTANTS = (_ROTATIONS, *_MASKS)
"""Ends of the names of such constants."""


@dataclass
class Placement:
    """Stored tensors and the parameters of the model that they are.

    Attributes:
        expected: {parameter: shape}.
        places: {parameter: stored tensor}.
        tied: parameters that may be missing, since another one holds their values.
        embedding, head: parameters of the two; empty for a head that there is not.
        without_effect, not_understood: as in `Account`, of tensors.
    """

    expected: dict[str, tuple[int, ...]]
    places: dict[str, str]
    tied: bool
    embedding: str
    head: str
    without_effect: dict[str, str]
    not_understood: dict[str, str]

    @classmethod
    def of(cls, model: Any, stored: StoredTensors, scales: set[str]) -> Placement:
        """Find the place of every stored tensor.

        Args:
            model: of transformers; its parameters need no values, its constants do.
            stored: from `read_stored`.
            scales: tensors that are used to dequantize others.
        """
        held = {**dict(model.named_parameters(remove_duplicate=False)), **stored_buffers(model)}
        expected = {name: tuple(each.shape) for name, each in held.items()}
        modules = {id(module): name for name, module in model.named_modules()}
        output = model.get_output_embeddings()
        placed = cls(
            expected=expected,
            places={},
            tied=bool(model.config.tie_word_embeddings),
            embedding=f"{modules[id(model.get_input_embeddings())]}.weight",
            head="" if output is None else f"{modules[id(output)]}.weight",
            without_effect={},
            not_understood={},
        )
        for name, tensor in stored.tensors.items():
            target = next((each for each in _spellings(name) if each in expected), None)
            if target is None:
                if name not in scales:
                    placed._place_other(name, model, stored)
            elif target in placed.places:
                placed.not_understood[name] = f"is stored twice, also as {placed.places[target]}"
            else:
                placed.places[target] = name
                if tensor.shape != expected[target]:
                    placed.not_understood[name] = (
                        f"has shape {list(tensor.shape)}, and config.json gives it {list(expected[target])}"
                    )
        return placed

    def _place_other(self, name: str, model: Any, stored: StoredTensors) -> None:
        """A tensor that is no parameter: a constant of an older version, or something unknown."""
        if _SHARED.search(name) and any(re.search(each, name) for each in _left_out(model)):
            self.without_effect[name] = (
                "keys and values of a layer that uses those of another one; transformers leaves it out, too"
            )
        elif name.endswith(CONSTANTS) and _is_constant(name, stored.read(name), model):
            self.without_effect[name] = _CONSTANT
        elif name.endswith(CONSTANTS):
            self.not_understood[name] = (
                "differs from what config.json gives, so it is a model of another kind"
            )
        else:
            self.not_understood[name] = "is not part of the model in config.json"

    def missing(self) -> dict[str, str]:
        """Parameters that no file holds."""
        excused = {self.head, self.embedding} if self.tied and self.head else set()
        if not excused & self.places.keys():
            excused = set()
        return {
            name: "is missing from its weights"
            for name in self.expected
            if name not in self.places and name not in excused
        }

    def heads_differ(self, stored: StoredTensors) -> bool:
        """Whether head and embedding are both stored, with other values."""
        if self.head not in self.places or self.embedding not in self.places or self.head == self.embedding:
            return False
        head, embedding = (stored.read(self.places[name]) for name in (self.head, self.embedding))
        if head.shape != embedding.shape:
            return True
        return any(
            not bool((head[start : start + _ROWS].float() == embedding[start : start + _ROWS].float()).all())
            for start in range(0, len(head), _ROWS)
        )


def _spellings(name: str) -> Iterator[str]:
    """A name as it is, and with or without the prefix of the stack."""
    yield name
    if name.startswith(_ENCODER):
        yield f"model.{name.removeprefix(_ENCODER)}"
    for prefix in _PREFIXES:
        yield f"{prefix}{name}"
        if name.startswith(prefix):
            yield name.removeprefix(prefix)


def _left_out(model: Any) -> list[str]:
    """Patterns of names that the model's class knows to be stored and does not load."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [rf"(?:^|\.){re.escape(each)}\." for each in patterns if each.startswith("layers.")]


def _is_constant(name: str, tensor: Tensor, model: Any) -> bool:
    """Whether a stored constant is the one that the configuration gives."""
    import torch

    if name.endswith(_ROTATIONS):
        own = [each for key, each in model.named_buffers() if key.endswith(_ROTATIONS)]
        tolerance = 1e-2 if tensor.dtype in (torch.float16, torch.bfloat16) else 1e-4
        return any(
            tensor.shape == each.shape
            and torch.allclose(tensor.float(), each.float(), rtol=tolerance, atol=1e-7)
            for each in own
        )
    if name.endswith(".attn.masked_bias"):
        return tensor.numel() == 1 and float(tensor) <= -1e4
    causal = tensor.reshape(tensor.shape[-2:]).bool() if tensor.dim() >= 2 else None
    return causal is not None and bool((causal == torch.ones_like(causal).tril()).all())
