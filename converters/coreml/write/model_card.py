"""README.md of a bundle: what it is, how good it is, and how an app uses it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from converters.coreml.write.export_plan import ExportPlan
from converters.coreml.write.lint import Finding
from converters.coreml.write.metadata import model_name
from edkm_export._version import __version__
from edkm_export.checkpoint import Checkpoint

__all__ = ["mac_commands", "model_card"]


def model_card(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    name: str,
    findings: Sequence[Finding],
    quality: str,
) -> str:
    """The text.

    Args:
        checkpoint: what was exported.
        plan: of the export.
        name: file name of the model.
        findings: of the device lint.
        quality: what the verification found, in Markdown.
    """
    base = model_name(checkpoint)
    front = ["---", "library_name: coreml", "tags: [coreml, palettization]"]
    front += [f"base_model: {base}"] if base else []
    parts = [
        "\n".join([*front, "---"]),
        f"# {name}",
        f"A Core ML model for {plan.target} and later, made by edkm-export {__version__}"
        + (f" from [{base}](https://huggingface.co/{base})." if base else "."),
        _facts(checkpoint, plan),
        f"## Quality\n\n{quality}",
        f"## Packages\n\n{_packages(plan, name)}",
        f"## Use\n\n{_use(plan, name)}",
        f"## On a Mac\n\nNone of this was run where the package was made.\n\n{_code('sh', mac_commands(plan, name))}",
    ]
    if findings:
        lines = [
            f"- **{finding.id}** ({finding.severity}), {finding.subject}: {finding.reason} Remedy: {finding.remedy}. "
            f"Source: {finding.source}."
            for finding in findings
        ]
        parts.append("## What devices are known to do\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


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


def _facts(checkpoint: Checkpoint, plan: ExportPlan) -> str:
    recipe = checkpoint.recipe.get("name", "not recorded")
    rows = {
        "interface": plan.interface,
        "positions": f"{plan.context:,}",
        "recipe": str(recipe),
        "bits a weight": f"{checkpoint.bits_per_weight:.2f}, LUTs and unpalettized weights included",
        "weights": f"{plan.weights_size_bytes / 1e6:,.1f} MB (float16: {checkpoint.numel * 2 / 1e6:,.1f} MB)",
    }
    return _table([("", ""), *rows.items()])


def _packages(plan: ExportPlan, name: str) -> str:
    rows = [("file", "layers", "weights")] + [
        (file, f"{layers.first} to {layers.end - 1}", f"{size / 1e6:,.1f} MB")
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
    return _table(rows) + chained


def _use(plan: ExportPlan, name: str) -> str:
    if plan.interface == "swift-transformers":
        words = (
            "With [swift-transformers](https://github.com/huggingface/swift-transformers); add the package and the "
            "tokenizer files of this folder to the app's resources."
        )
        return f"{words}\n\n{_code('swift', _SWIFT_TRANSFORMERS.format(name=name).strip().splitlines())}"
    if plan.interface == "neural-engine":
        words = (
            f"Two functions with static shapes: `prefill` takes {plan.prefill} tokens, `decode` one. Inputs: "
            "`inputIds` int32 [1, n], `position` int32 [1] of the first token, `fullAttentionMask` float16 [1, 1, n, "
            f"{plan.context}], 0 where a token may look and -65504 elsewhere. A prompt's last piece is padded "
            "on the right; what the padding writes to the cache is overwritten before any token attends to it."
        )
        return f"{words}\n\n{_code('swift', _NEURAL_ENGINE.format(name=name).strip().splitlines())}"
    return (
        f"`input_ids` int32 [1, {plan.context}] gives `logits` float16 [1, {plan.context}, vocabulary]; a shorter text "
        "is padded on the right. There is no cache."
    )


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


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _code(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
