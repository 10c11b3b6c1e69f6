"""Exports of several families and recipes in which nothing is wrong: the verifier must pass each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edkm_export.artifact.protocol import Artifact
from edkm_export.checkpoint import Checkpoint
from edkm_export.recipe import load_recipe
from tests.helpers.exports import palettized_folder
from tests.helpers.odd_families import CASES, build_case
from tests.helpers.odd_models import save

__all__ = ["UNHARMED", "Unharmed"]


@dataclass(frozen=True)
class Unharmed:
    """A random model of a family, palettized and exported.

    Attributes:
        family: a case of `odd_families.CASES`.
        recipe: a preset.
        form: an interface of Core ML packages, or "onnx" and a runtime profile.
    """

    family: str
    recipe: str
    form: str

    def make(self, folder: Path) -> tuple[Checkpoint, Artifact]:
        """Export into an empty folder."""
        kind, arguments = CASES[self.family]
        model = build_case(kind, {**arguments, "vocab_size": 320})  # what the tokenizer of the tests needs
        source = save(model.half(), folder / "model")
        checkpoint = palettized_folder(source, load_recipe(self.recipe), folder / "model.pt")
        (folder / "export").mkdir()
        return checkpoint, _export(checkpoint, self.form, folder / "export")

    def __str__(self) -> str:
        return f"{self.family} {self.recipe} {self.form}"


def _export(checkpoint: Checkpoint, form: str, folder: Path) -> Artifact:
    if form.startswith("onnx"):
        from converters.onnx.read.artifact import open_artifact as open_onnx
        from converters.onnx.write.bundle import write_bundle as write_onnx
        from converters.onnx.write.export_plan import plan_onnx

        write_onnx(checkpoint, plan_onnx(checkpoint, runtime=form.split()[1]), folder)
        return open_onnx(folder)
    from converters.coreml.read.artifact import open_artifact
    from converters.coreml.write.bundle import write_bundle
    from converters.coreml.write.export_plan import plan_export

    plan = plan_export(checkpoint, interface=form, sequence_length=32)
    return open_artifact(write_bundle(checkpoint, plan, folder, "model"))


UNHARMED = [
    Unharmed("mistral", "4bit", "swift-transformers"),
    Unharmed("qwen2", "6bit", "onnx exact"),
    Unharmed("qwen3", "3bit", "logits"),
    Unharmed("gemma2", "8bit", "onnx low-memory"),
    Unharmed("gemma3", "4bit", "logits"),
    Unharmed("gemma3n", "4bit", "onnx exact"),
    Unharmed("gemma4", "4bit", "onnx exact"),
    Unharmed("gemma4: dense", "4bit", "onnx exact"),
    Unharmed("phi3", "4bit-per-tensor", "onnx exact"),
    Unharmed("gpt2", "4bit", "logits"),
    Unharmed("qwen2", "dense", "logits"),
    Unharmed("llama", "2bit", "onnx exact"),
    Unharmed("qwen3", "4bit", "swift-transformers"),
]
