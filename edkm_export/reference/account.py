"""An account of a source: what became of every tensor and every setting that its files hold.

Each is used, known to have no effect on logits, or not understood. A source with one that is not understood is
refused: a model that was read without it would be another model, and every later check would compare with that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edkm_export.command_line import command_line
from edkm_export.errors import SourceError
from edkm_export.reference.origin import Origin

__all__ = ["Account"]


@dataclass(frozen=True)
class Account:
    """What a source holds.

    Attributes:
        source: what the user gave: a folder, a file or a hub id.
        kind: in words, such as "GGUF file (llama)" or "Hugging Face folder (Qwen3ForCausalLM)".
        tensors: names of the tensors that are used, as the source names them.
        settings: {name of a setting that is used: what it says}.
        without_effect: {tensor or setting that changes no logit: why not}.
        not_understood: {tensor or setting: what is missing to use it}.
        remarks: what was done to the weights on the way, such as a dequantization, in words.
        origin: licence and hub id, as far as the source names them.
    """

    source: str
    kind: str
    tensors: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)
    not_understood: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)

    def require_understood(self) -> None:
        """Refuse a source with a part that is not understood.

        Raises:
            SourceError: naming the first such part, and how many more there are.
        """
        if not self.not_understood:
            return
        name, why = next(iter(self.not_understood.items()))
        more = len(self.not_understood) - 1
        others = (
            f"; {more} more {'part is' if more == 1 else 'parts are'} not understood either" if more else ""
        )
        raise SourceError(
            f"{self.source}: {name}: {why}{others}. Without it this would be another model; "
            f"`{command_line('inspect', self.source)}` shows the whole account."
        )

    def provenance(self) -> dict[str, Any]:
        """The account for a checkpoint and a report: plain Python."""
        return {
            "kind": self.kind,
            "tensors_used": len(self.tensors),
            "settings_used": len(self.settings),
            "without_effect": dict(self.without_effect),
            "remarks": list(self.remarks),
            **self.origin.provenance(),
        }
