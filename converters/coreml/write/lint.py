"""What a device is known to do with a package, found before the long work.

Nothing here is seen by a check on Linux; the sources are Apple's documentation and issues that users reported. What
overflows float16 depends on activations: the verification's rounded run finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from converters.coreml.write.export_plan import LARGEST_CHUNK_BYTES, ExportPlan
from converters.coreml.write.vocabulary import LARGEST_DIMENSION
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import decoder_config
from edkm_export.decoder.config import ATTENDS, DecoderConfig
from edkm_export.decoder.embedding.embedding_model import embedding_config
from edkm_export.device_lint import Finding, worst_first
from edkm_export.palette import PalettizedTensor

__all__ = ["lint"]

_STATE_MULTIPLE = 32
_TRUSTED_GROUPS = (8, 16)
_MOST_VECTOR_VALUES = 256
_LONGEST_VECTOR = 16
_MOST_CHUNK_BYTES = 2 * LARGEST_CHUNK_BYTES


def lint(checkpoint: Checkpoint, plan: ExportPlan) -> list[Finding]:
    """Look at a plan with the eyes of a device; worst findings first."""
    source = str(checkpoint.path or "checkpoint")
    if checkpoint.embedding is not None:
        config = embedding_config(checkpoint.config, source)
    else:
        config = decoder_config(checkpoint.config, source)
    return worst_first(finding for check in _CHECKS for finding in check(checkpoint, plan, config))


_Found = Iterator[Finding]


def _select(checkpoint: Checkpoint, wanted: Callable[[PalettizedTensor], bool]) -> str:
    """How many palettized weights are so, and the first of them; nothing when none is."""
    names = [name for name, tensor in checkpoint.palettized.items() if wanted(tensor)]
    if len(names) < 2:
        return "".join(names)
    return f"{len(names)} weights ({names[0]}, ...)"


def _input_groups(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    if subject := _select(checkpoint, lambda tensor: tensor.groups[1] > 1):
        yield Finding(
            "input-channel-groups",
            "warning",
            subject,
            "LUTs for groups of input channels are not decoded by the Neural Engine; the layers run elsewhere.",
            "reported by users; coremltools groups output channels only unless told otherwise",
            "palettize with groups of output rows only (--group-size)",
        )


def _output_groups(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    if subject := _select(
        checkpoint, lambda tensor: tensor.groups[0] > 1 and tensor.group_size not in _TRUSTED_GROUPS
    ):
        yield Finding(
            "group-size",
            "note",
            subject,
            "more LUTs a weight cost speed on a device; groups of 8 or 16 rows are what coremltools advises.",
            "coremltools guide, Palettization, Performance",
            "palettize with --group-size 16",
        )


def _int8_luts(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    if subject := _select(checkpoint, lambda tensor: tensor.lut_scale is not None):
        yield Finding(
            "lut-scale",
            "error",
            subject,
            "an int8 LUT takes a scale; a scale op after a lookup crashes on the Neural Engine, and how the product is "
            "rounded is not specified.",
            "coremltools pull request 2688",
            "palettize with lut_dtype float16",
        )


def _vectors(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    def beyond(tensor: PalettizedTensor) -> bool:
        values = tensor.dim << tensor.n_bits
        return tensor.dim > 1 and (
            values > _MOST_VECTOR_VALUES or tensor.dim > _LONGEST_VECTOR or tensor.groups != (1, 1)
        )

    if subject := _select(checkpoint, beyond):
        yield Finding(
            "vector-lut",
            "warning",
            subject,
            f"vector LUTs are decoded by the Neural Engine with at most {_MOST_VECTOR_VALUES} values, vectors of at "
            f"most {_LONGEST_VECTOR}, and one LUT a weight.",
            "reported by users, not documented by Apple",
            "use fewer bits, shorter vectors, and --group-size 0",
        )


def _dimensions(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": max(map(config.intermediate_of, range(config.num_layers)))
        * (2 if config.gated and len(config.names.mlp_inputs) == 1 else 1),
        "the context": plan.context,
    }
    if plan.split is None and plan.interface != "embedding":  # tokens are looked up, no head gives logits
        sizes["the vocabulary"] = config.vocab_size
    for subject, size in sizes.items():
        if size > LARGEST_DIMENSION:
            split = subject == "the vocabulary" and plan.interface != "neural-engine"
            yield Finding(
                "large-dimension",
                "warning",
                f"{subject} is {size:,}",
                f"layers with an axis above {LARGEST_DIMENSION:,} do not run on the Neural Engine.",
                "reported by users, not documented by Apple",
                "use --interface neural-engine, which splits the output head"
                if split
                else "use groups that divide into parts of 16,384 rows (--group-size 16), or run on the GPU",
            )


def _package_size(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    largest = max(plan.package_sizes_bytes)
    if largest > LARGEST_CHUNK_BYTES:
        severity: Literal["error", "warning"] = "error" if largest > _MOST_CHUNK_BYTES else "warning"
        yield Finding(
            "package-size",
            severity if plan.interface == "neural-engine" else "warning",
            f"{largest / 1e9:.2f} GB of weights in one program",
            "the Neural Engine takes about 1 GB in one program on phones, 2 GB elsewhere; larger ones do not load.",
            "Apple developer forums, thread 727547; not documented by Apple",
            "use --interface neural-engine --chunks auto",
        )


def _flexible_states(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    if plan.interface == "swift-transformers":
        yield Finding(
            "flexible-shapes",
            "note",
            "inputIds and fullAttentionMask have ranged lengths",
            "flexible shapes together with states do not run on the Neural Engine, but on CPU and GPU.",
            "coremltools issue 2600",
            "load it with MLComputeUnits.cpuAndGPU, or use --interface neural-engine",
        )


def _state_sizes(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    head_dim = max(config.heads_of(kind).head_dim for kind in ATTENDS)
    if plan.interface == "swift-transformers" and (
        head_dim % _STATE_MULTIPLE or plan.context % _STATE_MULTIPLE
    ):
        yield Finding(
            "state-size",
            "note",
            f"states of {plan.context} positions x {head_dim} channels",
            f"states whose last axes are not multiples of {_STATE_MULTIPLE} fail on the Neural Engine.",
            "coremltools issue 2631",
            f"use --interface neural-engine, which pads them, or a --sequence-length divisible by {_STATE_MULTIPLE}",
        )


def _crashes(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    if plan.interface not in ("logits", "embedding") and (
        subject := _select(checkpoint, lambda tensor: tensor.n_bits == 4)
    ):
        yield Finding(
            "stateful-4-bit",
            "warning",
            subject,
            "stateful packages with 4-bit LUTs built by coremltools 9.0 crashed after 100 to 200 predictions, or gave "
            "wrong numbers, on the Neural Engine of some users.",
            "coremltools issue 2716, open",
            "generate 500 tokens on the device that you ship for; 6 bits or the GPU are not known to be affected",
        )


def _embedding(checkpoint: Checkpoint, plan: ExportPlan, config: DecoderConfig) -> _Found:
    if plan.interface == "neural-engine":
        yield Finding(
            "embedding",
            "note",
            f"{config.names.stack}.{config.names.embedding}",
            "looking tokens up runs on the CPU, which then hands over to the Neural Engine once a call.",
            "Core ML performance reports of users",
            "nothing: it takes a few microseconds",
        )


_CHECKS: Sequence[Callable[[Checkpoint, ExportPlan, DecoderConfig], _Found]] = (
    _input_groups,
    _output_groups,
    _int8_luts,
    _vectors,
    _dimensions,
    _package_size,
    _flexible_states,
    _state_sizes,
    _crashes,
    _embedding,
)
