"""The first rung: is the original the model that its files describe?

Every later rung compares with the original as it was read, so what reading it lost would be in none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from edkm_export.artifact.metrics import Divergence, divergence
from edkm_export.artifact.thresholds import SOURCE_RUNTIME
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import EdkmExportError
from edkm_export.reference import llamacpp
from edkm_export.reference.account import Account
from edkm_export.reference.source import Source, account
from edkm_export.verify.report import Rung, Verdict

__all__ = ["SourceRuntime", "compare_with_runtime", "source_rung", "source_runtime_rung"]

_MOST_NAMED = 3


class SourceRuntime(Protocol):
    """A runtime of GGUF files that shares nothing with us, such as llama.cpp."""

    def available(self) -> object:
        """Something true where it is installed."""

    def log_probabilities(self, path: Path, tokens: Sequence[int]) -> Tensor:
        """Of the next token at each position: float32 [positions, vocab_size]."""

    def unpacked(self, path: Path, size_bytes: int) -> contextlib.AbstractContextManager[Path | None]:
        """The same file with float32 weights, as the runtime unpacks them; None where it cannot."""


def source_rung(checkpoint: Checkpoint, original: Source | None, missing: str) -> Rung:
    """Every tensor and every setting of the source against what is understood.

    Args:
        checkpoint: its provenance names the account that was made when it was palettized.
        original: the source; None: it is not here.
        missing: why not.
    """
    names: dict[str, Any] = {
        "id": "source",
        "reference": "files of the original",
        "candidate": "original float model, as it was read",
        "threshold": "every tensor and every setting is used, or known to change no logit",
        "why": "what reading the original lost would be missing in all that is compared with it",
    }
    if original is None:
        recorded = checkpoint.provenance.get("source")
        before = (
            f"; when it was palettized, {recorded.get('tensors_used')} tensors and {recorded.get('settings_used')} "
            "settings were used and none was left over"
            if isinstance(recorded, dict)
            else ""
        )
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=f"no original to account for: {missing}{before}")
    try:
        found = account(original)
        digests = {**original.provenance()["sha256"]}
    except (EdkmExportError, OSError) as error:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=str(error))
    return Rung(
        **names,
        verdict=Verdict.FAIL if found.not_understood else Verdict.PASS,
        detail=_words(found, digests),
        measures={**found.provenance(), "not_understood": dict(found.not_understood), "sha256": digests},
    )


def _words(found: Account, digests: dict[str, str]) -> str:
    left = len(found.not_understood)
    total = len(found.tensors) + len(found.settings) + len(found.without_effect) + left
    parts = [
        f"{found.kind}: {total - left} of {total} accounted for ({len(found.tensors)} tensors and "
        f"{len(found.settings)} settings used, {len(found.without_effect)} without effect)"
    ]
    named = [f"{name}: {why}" for name, why in list(found.not_understood.items())[:_MOST_NAMED]]
    if named:
        more = f", and {left - len(named)} more" if left > len(named) else ""
        parts.append(f"not understood: {', '.join(named)}{more}")
    parts += [f"sha256 {name} {digest[:16]}..." for name, digest in list(digests.items())[:_MOST_NAMED]]
    return "; ".join([*parts, *found.remarks])


def compare_with_runtime(
    runtime: SourceRuntime | None,
    original: Source | None,
    logits: list[Tensor] | None,
    windows: Tensor,
    *,
    values: int = 0,
) -> tuple[Divergence | str | None, bool]:
    """Run a GGUF file in a runtime of its own.

    Quantized weights are unpacked by the runtime first, since it would round activations in front of them.

    Args:
        runtime: None: none was given.
        original: the source.
        logits: of the original on each window, float32 [positions, vocab_size]; None: it was not run.
        windows: int64 [windows, positions].
        values: weights of the model.

    Returns:
        The distance of the original from the runtime on the first window; what failed, in words; None: not installed.
        And whether activations were rounded, since quantized weights could not be unpacked.
    """
    if runtime is None or original is None or logits is None or not runtime.available():
        return None, False
    path, tokens, rounded = original.weight_files()[0], windows[0].tolist(), False
    try:
        if original.is_quantized:
            with runtime.unpacked(path, 4 * values) as plain:
                rounded = plain is None
                expected = runtime.log_probabilities(plain or path, tokens)
        else:
            expected = runtime.log_probabilities(path, tokens)
    except EdkmExportError as error:
        return str(error), rounded
    if expected.shape != logits[0].shape:
        return f"it gives {list(expected.shape)} probabilities, the original {list(logits[0].shape)}", rounded
    return divergence([(expected, logits[0])]), rounded


def source_runtime_rung(found: Divergence | str | None, *, rounded: bool, missing: str = "") -> Rung:
    """The original against llama.cpp.

    Args:
        found: from `compare_with_runtime`.
        rounded: whether activations were rounded, from there too.
        missing: why it was not tried, where that is not for want of llama.cpp.
    """
    threshold = SOURCE_RUNTIME[rounded]
    names: dict[str, Any] = {
        "id": "source-llama.cpp",
        "reference": "llama.cpp",
        "candidate": "original float model, as it was read",
        "threshold": str(threshold),
        "why": threshold.why,
    }
    if found is None:
        detail = (
            missing
            or f"llama.cpp is not installed, or the original was not run; to install it: {llamacpp.INSTALL}"
        )
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=detail)
    if isinstance(found, str):
        return Rung(**names, verdict=Verdict.FAIL, detail=found)
    close = found.settled_agreement >= threshold.top1 and found.kl_median <= threshold.median_kl
    return Rung(
        **names,
        verdict=Verdict.PASS if close else Verdict.FAIL,
        detail=f"top-1 agreement {found.top1_agreement:.2%}, KL median {found.kl_median:.2g}, mean {found.kl_mean:.2g} "
        f"over {found.tokens:,} tokens",
        measures=found.model_dump(),
    )
