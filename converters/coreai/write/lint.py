"""What devices are known to do with a model, found before the long work.

Nothing here is seen by a check on Linux; the sources are issues that users of apple/coreai-models reported.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.coreai.write.export_plan import CoreAIPlan
from edkm_export.checkpoint import Checkpoint
from edkm_export.device_lint import Finding, worst_first
from edkm_export.kv_cache import INT8

__all__ = ["lint"]

_LARGEST_FILE = 2 << 30
_LONGEST_CACHE = 2048
_MULTIPLE = 32


def lint(checkpoint: Checkpoint, plan: CoreAIPlan) -> list[Finding]:
    """Look at a plan with the eyes of a device; worst findings first."""
    return worst_first(_findings(checkpoint, plan))


def _findings(checkpoint: Checkpoint, plan: CoreAIPlan) -> Iterator[Finding]:
    if plan.weights_size_bytes >= _LARGEST_FILE:
        yield Finding(
            "file-size",
            "error",
            f"{plan.weights_size_bytes / 1e9:.1f} GB of weights",
            "a program of 2 GB and more is reported not to load on iOS.",
            "apple/coreai-models issue 279",
            "palettize with fewer bits",
        )
    if plan.context >= _LONGEST_CACHE:
        yield Finding(
            "cache-length",
            "warning",
            f"{plan.context:,} positions",
            "with a cache of 2,048 positions and more, a model on iOS is reported to give wrong text from the first "
            "token; shorter caches of the same model were right.",
            "apple/coreai-models issue 124",
            f"export with --context-length {_LONGEST_CACHE // 2}, or compare text on the device",
        )
    three = [name for name, tensor in checkpoint.palettized.items() if tensor.n_bits == 3]
    if three and not plan.pad_3bit:
        yield Finding(
            "3-bit-indices",
            "note",
            f"{len(three)} weights ({three[0]}, ...)" if len(three) > 1 else three[0],
            "indices of 3 bits run in Apple's runtime for Linux, but Apple's own converter does not write them, and "
            "they were not seen on a device.",
            "coreai-torch 0.4.3",
            "if a device refuses them, export with --pad-3bit (indices take a third more)",
        )
    if plan.kv_cache == INT8:
        yield Finding(
            "int8-states",
            "error",
            "states keyCache, valueCache: int8",
            "the engines of apple/coreai-models end the program at a state that is not a float; the model is for "
            "programs that call Core AI themselves, with the four states of docs/coreai.md.",
            "apple/coreai-models 34ab73d, StateHandler+NDArray.swift",
            "export with --kv-cache float for Apple's engines",
        )
    if plan.interface == "dynamic":
        yield Finding(
            "one-function",
            "note",
            "function main",
            "Apple's engine runs a model with one dynamic function on the GPU, not on the Neural Engine.",
            "apple/coreai-models issue 205; ModelStructure.swift",
            "export with --interface neural-engine for the Neural Engine",
        )
        return
    width = plan.config.num_kv_heads * plan.config.head_dim
    if width % _MULTIPLE:
        yield Finding(
            "state-multiple",
            "warning",
            f"states of {width} channels",
            f"dimensions of states that are no multiple of {_MULTIPLE} keep a model off the Neural Engine.",
            "coremltools issue 2631",
            "use --interface dynamic",
        )
