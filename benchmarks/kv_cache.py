"""What int8 keys and values cost hard PyTorch, with a scale for each head and token, and with one for each head.

    python -m benchmarks.kv_cache MODEL.PT [--tokens 1024]

The text is the verifier's built-in sample. Scales of the second kind are constants from fixtures/calibration.txt: the
largest magnitude of each head, or a quantile of them. The last row says what codes cost that fall to the other
side: the first scheme twice, once with keys and values moved by a millionth, as another order of sums moves them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm_export.artifact.metrics import divergence, perplexity, token_losses
from edkm_export.checkpoint import load
from edkm_export.kv_cache import LARGEST_CODE, LEAST_SCALE
from edkm_export.reference.caching import new_cache, run_cached
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.reference.int8_cache import through_int8
from edkm_export.text import token_windows

Change = Callable[[Tensor, int, str], Tensor]  # of keys or values of a layer
CALIBRATION = Path(__file__).resolve().parents[1] / "fixtures" / "calibration.txt"


def run(model: Any, windows: Sequence[Tensor], change: Change) -> list[Tensor]:
    """Logits of each window, its keys and values changed before they are read."""
    made = []
    for tokens in windows:
        cache = new_cache(model)
        made.append(run_cached(model, tokens[None], _changing(cache, cache.update, change))[0].float())
    return made


def _changing(cache: Any, update: Any, change: Change) -> Any:
    def changed(keys: Tensor, values: Tensor, layer: int, *args: Any, **more: Any) -> Any:
        return update(change(keys, layer, "key"), change(values, layer, "value"), layer, *args, **more)

    cache.update = changed
    return cache


def magnitudes(model: Any, windows: Sequence[Tensor]) -> dict[tuple[int, str], Tensor]:
    """Of the keys and values of each layer, [heads, numbers]."""
    seen: dict[tuple[int, str], list[Tensor]] = {}

    def record(x: Tensor, layer: int, what: str) -> Tensor:
        seen.setdefault((layer, what), []).append(x[0].abs().flatten(1))
        return x

    run(model, windows, record)
    return {place: torch.cat(parts, 1) for place, parts in seen.items()}


def with_constants(seen: dict[tuple[int, str], Tensor], top: Callable[[Tensor], Tensor]) -> Change:
    """One scale a head; what is larger is cut off."""
    scales = {
        place: (top(each) / LARGEST_CODE).clamp_min(LEAST_SCALE)[None, :, None, None]
        for place, each in seen.items()
    }

    def change(x: Tensor, layer: int, what: str) -> Tensor:
        scale = scales[layer, what]
        return (x / scale).round().clamp(-LARGEST_CODE, LARGEST_CODE) * scale

    return change


def main() -> None:
    parser = argparse.ArgumentParser(description="What int8 keys and values cost.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    checkpoint = load(given.checkpoint)
    model, tokenizer = load_hard_model(checkpoint), load_hard_tokenizer(checkpoint)

    def windows(text: str, tokens: int) -> Tensor:
        return token_windows(text, tokenizer, tokens=tokens, context=512, source="benchmark")

    sample = (files("edkm_export.verify") / "sample.txt").read_text(encoding="utf-8")
    text = windows(sample, given.tokens)
    seen = magnitudes(model, windows(CALIBRATION.read_text(encoding="utf-8"), 2048))
    noise = torch.Generator().manual_seed(0)
    schemes: dict[str, Change] = {
        "a head and token": lambda x, layer, what: through_int8(x),
        "a head and token, values alone": lambda x, layer, what: through_int8(x) if what == "value" else x,
        "a head, largest": with_constants(seen, lambda each: each.amax(1)),
        "a head, 99.99%": with_constants(seen, lambda each: each.quantile(0.9999, 1)),
        "a head, 99.9%": with_constants(seen, lambda each: each.quantile(0.999, 1)),
    }
    floats = run(model, text, lambda x, layer, what: x)
    print("| a scale for | KL mean | median | 99.9% | top-1 | perplexity |\n|---|---|---|---|---|---|")
    before = perplexity(token_losses(one, window) for one, window in zip(floats, text, strict=True)).value
    for name, change in schemes.items():
        made = run(model, text, change)
        after = perplexity(token_losses(one, window) for one, window in zip(made, text, strict=True)).value
        row(name, floats, made, f"{before:.3f} -> {after:.3f} (x{after / before:.4f})")
    first = run(model, text, schemes["a head and token"])
    moved = run(
        model,
        text,
        lambda x, layer, what: through_int8(x * (1 + 1e-6 * torch.randn(x.shape, generator=noise))),
    )
    row("a head and token, moved by 1e-6, against unmoved", first, moved, "")


def row(name: str, reference: list[Tensor], candidate: list[Tensor], words: str) -> None:
    found = divergence(zip(reference, candidate, strict=True))
    print(
        f"| {name} | {found.kl_mean:.2g} | {found.kl_median:.2g} | {found.kl_p999:.2g} | {found.top1_agreement:.1%} | "
        f"{words} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
