"""What a model card says of a Core ML folder: its packages, and how an app uses them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from converters.coreml.write.export_plan import ExportPlan
from edkm_export.checkpoint import Checkpoint
from edkm_export.device_lint import Finding, card_sections
from edkm_export.embedding_card import MARKED_PROMPTS, prompts_section
from edkm_export.embedding_settings import EmbeddingSettings
from edkm_export.escaping import for_markdown, for_swift
from edkm_export.model_card import FormatCard, code, table

__all__ = ["coreml_card", "mac_commands"]


def coreml_card(
    checkpoint: Checkpoint, plan: ExportPlan, name: str, findings: Sequence[Finding]
) -> FormatCard:
    """What the format adds.

    Args:
        checkpoint: what was exported.
        plan: of the export.
        name: file name of the model.
        findings: of the device lint.
    """
    settings = checkpoint.embedding
    sections = {
        "Packages": _packages(plan, name),
        "Use": _use(plan, name) if settings is None else _embedding_use(settings, plan),
        "On a Mac": f"None of this was run where the package was made.\n\n{code('sh', mac_commands(plan, name))}",
    }
    sections |= card_sections(findings) | ({} if settings is None else prompts_section(settings))
    return FormatCard(
        library="coreml",
        tags=["coreml", *_TAGS.get(plan.interface, [])],
        summary=f"A Core ML model for {plan.target} and later",
        facts={
            "interface": plan.interface,
            "positions": f"{plan.context:,}",
            "weights": f"{plan.weights_size_bytes / 1e6:,.1f} MB (float16: {checkpoint.numel * 2 / 1e6:,.1f} MB)",
        },
        sections=sections,
    )


def mac_commands(
    plan: ExportPlan, name: str, folder: str | Path = ".", checkpoint: str | Path = "MODEL.PT"
) -> list[str]:
    """Shell commands that need a Mac with Xcode, for packages in a folder."""
    files = [Path(folder) / file for file in plan.package_names(name)]
    verify = shlex.join(["edkm-export", "verify", str(checkpoint), str(folder)])
    return [
        *(shlex.join(["xcrun", "coremlcompiler", "compile", str(file), "compiled"]) for file in files),
        f"{verify}   # runs Apple's own runtime too",
    ]


_TAGS = {
    "swift-transformers": ["swift-transformers"],
    "embedding": ["sentence-transformers", "sentence-similarity"],
}


def _packages(plan: ExportPlan, name: str) -> str:
    rows = [("file", "layers", "weights")] + [
        (for_markdown(file), f"{layers.first} to {layers.end - 1}", f"{size / 1e6:,.1f} MB")
        for file, layers, size in zip(
            plan.package_names(name), plan.chunks, plan.package_sizes_bytes, strict=True
        )
    ]
    chained = (
        "\n\nThe packages run in this order for each call: `hiddenStatesOut` of one is `hiddenStates` of the next. "
        "Each has a state of its own."
        if len(plan.chunks) > 1
        else ""
    )
    return table(rows) + chained


def _embedding_use(settings: EmbeddingSettings, plan: ExportPlan) -> str:
    marks = "" if settings.include_prompt else MARKED_PROMPTS
    return (
        f"`input_ids` and `attention_mask` int32 [1, {plan.context}] give `sentence_embedding` float16 "
        f"[1, {settings.dimension(plan.hidden_size)}] ({settings.words()}). The tokens of the text stand first, with a "
        f"1 in the mask each; the rest is padding, with a 0.{marks} Texts are cut to {settings.max_tokens} tokens."
    )


def _use(plan: ExportPlan, name: str) -> str:
    if plan.interface == "swift-transformers":
        words = (
            "With [swift-transformers](https://github.com/huggingface/swift-transformers); add the package and the "
            "tokenizer files of this folder to the app's resources."
        )
        return f"{words}\n\n{_swift(_SWIFT_TRANSFORMERS, name)}"
    if plan.interface == "neural-engine":
        words = (
            f"Two functions with static shapes: `prefill` takes {plan.prefill} tokens, `decode` one. Inputs: "
            "`inputIds` int32 [1, n], `position` int32 [1] of the first token, `fullAttentionMask` float16 [1, 1, n, "
            f"{plan.context}], 0 where a token may look and -65504 elsewhere. A prompt's last piece is padded "
            "on the right; what the padding writes to the cache is overwritten before any token attends to it. Where "
            "`prefill` has an input `tokenCount`, int32 [1], it takes how many of its tokens are real."
        )
        return f"{words}\n\n{_swift(_NEURAL_ENGINE, name)}"
    return (
        f"`input_ids` int32 [1, {plan.context}] gives `logits` float16 [1, {plan.context}, vocabulary]; a shorter text "
        "is padded on the right. There is no cache."
    )


def _swift(example: str, name: str) -> str:
    """A block of code with the name as the contents of a string."""
    return code("swift", example.format(name=for_swift(name)).strip().splitlines())


_SWIFT_TRANSFORMERS = """
import CoreML
import Generation
import Models
import Tokenizers

let bundle = Bundle.main.resourceURL!
let tokenizer = try await AutoTokenizer.from(modelFolder: bundle)
let model = try LanguageModel.loadCompiled(
    url: bundle.appending(path: "{name}.mlmodelc"), computeUnits: .cpuAndGPU, tokenizer: tokenizer)
await model.resetState()
var config = model.defaultGenerationConfig
config.maxNewTokens = 100
let text = try await model.generate(config: config, prompt: "Once upon a time")
"""

_NEURAL_ENGINE = """
import CoreML

let configuration = MLModelConfiguration()
configuration.computeUnits = .cpuAndNeuralEngine
configuration.functionName = "decode"
let url = Bundle.main.url(forResource: "{name}", withExtension: "mlmodelc")!
let decode = try MLModel(contentsOf: url, configuration: configuration)
configuration.functionName = "prefill"
let prefill = try MLModel(contentsOf: url, configuration: configuration)
let state = decode.makeState()
// prefill.prediction(from: inputs, using: state) for the prompt, then decode with the same state
"""
