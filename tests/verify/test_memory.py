"""Models that the memory does not hold: the same numbers, layer by layer, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.memory_budget import MemoryBudget, room_if_needed
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source
from edkm_export.verify.html import report_page
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.report import Report
from edkm_export.verify.time_budget import Share, run_windows
from edkm_export.verify.torch_runs import transformers_model
from edkm_export.verify.write import markdown
from tests.helpers.paths import FIXTURES

pytest.importorskip("coremltools")

from converters.coreml.read.artifact import open_artifact
from converters.coreml.read.decoded_weights import DecodedWeights
from converters.coreml.read.package import load_package
from edkm_export.artifact.protocol import Artifact

TEXT = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")
NOTHING = MemoryBudget(1, asked=True)


@pytest.fixture
def no_small_constants(monkeypatch):
    """Weights of small models are weights too."""
    monkeypatch.setattr(DecodedWeights, "SMALL_BYTES", 1 << 10)


def climb(export: Any, artifact: Artifact, source: Path, memory: MemoryBudget | None) -> Report:
    evaluation = VerificationInputs(
        TEXT,
        "words",
        tokens=160,
        original=Source.parse(str(source)),
        continuation=6,
        localize=True,
        memory=memory,
    )
    return verify_artifact(export.checkpoint, artifact, evaluation)


def test_report_is_the_same_but_for_how_it_was_run(tiny_export, tiny_llama, no_small_constants):
    whole = climb(tiny_export, open_artifact(tiny_export.package), tiny_llama, None)
    streamed = climb(tiny_export, open_artifact(tiny_export.package, 0), tiny_llama, NOTHING)
    found, expected = streamed.model_dump(), whole.model_dump()
    memory = found.pop("memory")
    assert expected.pop("memory") is None
    assert found.pop("date") and expected.pop("date")
    assert found == expected
    assert memory["budget"] == "1 bytes asked for (--memory)"
    assert memory["models"].keys() == {"the original", "hard PyTorch"}
    assert all(how.startswith("layer by layer") for how in memory["models"].values())
    assert "- memory: 1 bytes asked for (--memory); the original was run layer by layer" in markdown(streamed)
    assert "<b>Memory:</b> 1 bytes asked for" in report_page(streamed)
    assert "emory:" not in markdown(whole) + report_page(whole)
    assert Report.model_validate_json(streamed.model_dump_json()) == streamed


def test_what_fits_is_run_whole(tiny_export, tiny_llama):
    plenty = MemoryBudget(1 << 36)
    assert climb(tiny_export, open_artifact(tiny_export.package), tiny_llama, plenty).memory is None


@pytest.mark.parametrize("precision", ["float32", "rounded", "float16"])
@pytest.mark.parametrize("room", [0, 4_000_000])
def test_interpreter_that_decodes_at_each_use(tiny_export, no_small_constants, precision, room):
    decoded = DecodedWeights(room)
    package, whole = load_package(tiny_export.package, decoded), load_package(tiny_export.package)
    function = whole.functions[whole.default_function]
    shapes = {name: given.type.fixed_shape for name, given in function.inputs.items()}
    assert None not in shapes.values()
    inputs = {name: torch.arange(shape[1]).remainder(90)[None].int() for name, shape in shapes.items()}
    other = "float16" if precision == "float32" else "float32"
    for each in (precision, other, precision):  # what is held for one is of no use for the other
        found = package.run(inputs, precision=each)
        assert all(
            torch.equal(found[name], value) for name, value in whole.run(inputs, precision=each).items()
        )
        large = [value for value in decoded._kept.values() if value.numel() * value.element_size() > 1 << 10]
        assert sum(value.numel() * value.element_size() for value in large) <= room
        assert bool(large) == bool(room)


def test_commands_give_the_same(edkm, tiny_export, tiny_llama, tmp_path):
    tiny_export.checkpoint.save(tmp_path / "model.pt")
    prompt = ("--prompt", "The meaning of", "--max-new-tokens", 5)
    for path in (tmp_path / "model.pt", tiny_export.package):
        if path.suffix != ".pt" and open_artifact(path).session() is None:
            continue
        assert edkm("generate", path, *prompt).out == edkm("generate", path, *prompt, "--memory", "1MB").out
    compare = ("compare", tmp_path / "model.pt", "--original", tiny_llama, "--tokens", 200, "--json")
    whole, streamed = (json.loads(edkm(*compare, *more).out) for more in ((), ("--memory", "2kB")))
    assert [row.pop("kind") for row in streamed] == [row.pop("kind") + ", layer by layer" for row in whole]
    assert whole == streamed


@pytest.mark.parametrize("size", ["16", "0GB", "-1GB", "lots", "16 bytes"])
def test_sizes_that_are_none(edkm, size):
    result = edkm("generate", FIXTURES / "heldout.txt", "--prompt", "a", f"--memory={size}")
    assert result.status == 2 and "is no size above 0 with its unit, such as 16GB" in result.err


def test_budget():
    assert MemoryBudget.of(5).asked and not MemoryBudget.of(None).asked
    assert MemoryBudget.of(None).total_bytes > 0
    assert MemoryBudget(9_000_000_000).room_bytes(reserved_bytes=2_000_000_000, models=2) == 3_000_000_000
    assert MemoryBudget(1).room_bytes() == 0
    assert (
        room_if_needed(25, 100) is None and room_if_needed(26, 100) == 100 and room_if_needed(1, None) is None
    )


def test_windows_together_while_there_is_time(tiny_checkpoint):
    """One, two, four: a wave is begun when twice the time of the last one is left."""
    now = 0.0
    execute = transformers_model(load_hard_model(tiny_checkpoint, room_bytes=0))
    sizes = []

    class Counting:
        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            return execute(tokens)

        def together(self, texts: list[torch.Tensor]) -> list[torch.Tensor]:
            nonlocal now
            now += 10 * len(texts)
            sizes.append(len(texts))
            return execute.together(texts)

    windows = torch.arange(70).remainder(50).view(10, 7)
    assert len(run_windows(Counting(), windows, Share(69.0, lambda: now))) == 3 and sizes == [1, 2]
    sizes.clear()
    whole = run_windows(Counting(), windows, Share(None, lambda: now))
    assert len(whole) == 10 and sizes == [10]
    expected = transformers_model(load_hard_model(tiny_checkpoint))
    assert all(torch.equal(one, expected(window)) for one, window in zip(whole, windows, strict=True))
