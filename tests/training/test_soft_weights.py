"""The soft model of a run: rebuilt from what is on disk, and equal to what training computed with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.checkpoint import load
from edkm_export.errors import InputError
from edkm_export.recipe import Recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.soft_model import load_soft_model
from edkm_export.reference.source import Source, load_model
from edkm_export.training import run_checkpoints
from edkm_export.training.preparation import insert
from edkm_export.training.run import Run
from edkm_export.training.run_weights import load_weights
from edkm_export.training.soft_weights import read_soft_weights
from edkm_export.training.train_config import TrainConfig
from edkm_export.verify.report import Report, Rung, Verdict
from tests.helpers.paths import FIXTURES

MODEL, DATA, HELDOUT = FIXTURES / "tiny-llama", FIXTURES / "calibration.txt", FIXTURES / "heldout.txt"
TINY = TrainConfig(
    bits=3,
    steps=4,
    batch_size=2,
    context=32,
    importance="none",
    calibration_tokens=32,
    eval_tokens=64,
    log_every=1,
    save_every=2,
)
WEIGHT = "model.layers.1.mlp.up_proj.weight"
TOKENS = torch.arange(5, 69)[None]


def run(folder: Path, changes: dict[str, Any] | None = None, **arguments: Any) -> None:
    made = Run(Source.parse(str(MODEL)), [DATA], folder, TINY.updated(changes or {}))
    made.complete(device="cpu", **arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run with the gradient straight through; to be read only."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(folder)
    return folder


@pytest.fixture
def spoilt(plain, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(plain, tmp_path / "run"))


@pytest.mark.slow
def test_soft_model_of_dkm_is_what_its_forward_passes_compute(tmp_path):
    """The student in training mode against the soft model from disk; SDPA against eager attention costs some 1e-5."""
    config = TINY.updated({"backward": "dkm", "iterations": 3, "group_size": 0, "train_embedding": True})
    run(tmp_path / "run", config.model_dump())
    made = load(tmp_path / "run" / "model.pt")
    found = load_soft_model(made, read_soft_weights(tmp_path / "run", made))
    source = Source.parse(str(MODEL))
    student = load_model(source, torch.float32)
    insert(student, Recipe.model_validate(made.recipe), config, seeded=False, source="tiny")
    load_weights(student, run_checkpoints.last_complete(tmp_path / "run" / "checkpoints"))
    expected = logits(student.train())
    assert torch.allclose(logits(found), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(load_hard_model(made)), expected, atol=1e-2)  # soft is another model


@pytest.mark.parametrize("backward", ["straight-through", "soft"])
def test_soft_weight_is_that_of_the_equations(backward, plain, tmp_path):
    """Attention over the LUT and one more mean of the cluster, written out in float64."""
    folder = plain
    if backward == "soft":
        folder = tmp_path / "run"
        run(folder, {"backward": "soft", "alpha": 1.5})
    made = load(folder / "model.pt")
    soft = read_soft_weights(folder, made)
    assert ("straight through" if backward == "straight-through" else "backward pass only") in soft.how
    assert "28 of 29 weights" in soft.how and "step 4" in soft.how  # the embedding has 256 entries
    found = dict(soft.weights())
    assert found.keys() == made.palettized.keys() - {"model.embed_tokens.weight"}
    state = torch.load(run_checkpoints.last_complete(folder / "checkpoints") / run_checkpoints.WEIGHTS)
    module = WEIGHT.removesuffix("weight") + "clusters."
    weight, lut, unit = (state[module + part].double() for part in ("weight", "lut", "unit"))
    centroids = lut * unit
    grouped = weight.view(len(centroids), -1)
    hard = made.palettized[WEIGHT].decode().double().view_as(grouped)
    tau = (
        (grouped - hard).square().mean(1) if backward == "straight-through" else state[module + "temperature"]
    )
    attention = (-(grouped[..., None] - centroids[:, None]).square() / tau[:, None, None]).softmax(-1)
    means = (attention * grouped[..., None]).sum(1) / attention.sum(1)
    expected = (attention * means[:, None]).sum(-1).view_as(weight)
    assert torch.allclose(found[WEIGHT].double(), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("changes", [{}, {"target_decoder_bits": 4.0}], ids=["uniform", "mixed"])
def test_soft_weights_of_an_int4_grid(changes, tmp_path):
    """The state is rounded again as the recipe says, which is compared with what was shipped."""
    run(tmp_path / "run", {"backward": "soft", "lut_dtype": "int4", "steps": 2, **changes})
    made = load(tmp_path / "run" / "model.pt")
    bits = {tensor.n_bits for name, tensor in made.palettized.items() if "embed" not in name}
    assert (4 in bits) == bool(changes) and 3 in bits
    assert len(dict(read_soft_weights(tmp_path / "run", made).weights())) >= 20


def test_state_of_an_older_version(spoilt):
    """Indices were called codes."""
    made = load(spoilt / "model.pt")
    expected = dict(read_soft_weights(spoilt, made).weights())
    module = WEIGHT.removesuffix("weight") + "clusters."

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith(".clusters.indices")]:
            state[name.removesuffix("indices") + "codes"] = state.pop(name)
        assert module + "codes" in state

    edit_state(spoilt, rename)
    found = dict(read_soft_weights(spoilt, made).weights())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_checkpoint_without_its_recipe_is_refused(plain):
    made = dataclasses.replace(load(plain / "model.pt"), recipe={"name": "imported"})
    with pytest.raises(InputError, match="does not say how it was trained"):
        read_soft_weights(plain, made)


@pytest.mark.slow
def test_run_that_was_cut_and_resumed(spoilt):
    expected = dict(read_soft_weights(spoilt, load(spoilt / "model.pt")).weights())
    shutil.rmtree(spoilt / "checkpoints" / "checkpoint-4")
    with pytest.raises(InputError, match=r"checkpoint-2: is of step 2, and .*model.pt of step 4"):
        read_soft_weights(spoilt, load(spoilt / "model.pt"))
    run(spoilt, resume=True)
    found = dict(read_soft_weights(spoilt, load(spoilt / "model.pt")).weights())
    # the same sums with as many threads as the machine likes
    assert torch.allclose(found[WEIGHT], expected[WEIGHT], atol=1e-5)


@pytest.mark.slow
def test_run_that_time_ended_keeps_its_last_state(tmp_path):
    run(tmp_path / "run", {"steps": None, "minutes": 0.01, "save_every": 10_000})
    made = load(tmp_path / "run" / "model.pt")
    assert len(dict(read_soft_weights(tmp_path / "run", made).weights())) == 28


def test_state_of_another_run_is_refused(spoilt, tmp_path):
    run(tmp_path / "other", {"weight_rate": 5e-3})
    shutil.rmtree(spoilt / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", spoilt / "checkpoints")
    soft = read_soft_weights(spoilt, load(spoilt / "model.pt"))
    with pytest.raises(InputError, match="is not the one that was shipped; it is of another run"):
        list(soft.weights())


def edit_state(folder: Path, change: Any) -> None:
    path = run_checkpoints.last_complete(folder / "checkpoints") / run_checkpoints.WEIGHTS
    state = torch.load(path)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop(WEIGHT.removesuffix("weight") + "clusters.unit"),
        lambda state: state.update({WEIGHT.removesuffix("weight") + "clusters.lut": torch.zeros(3)}),
    ],
    ids=["missing", "misshapen"],
)
def test_state_that_does_not_fit_is_refused(change, spoilt):
    edit_state(spoilt, change)
    with pytest.raises(InputError, match=f"its {WEIGHT} is not the one that was shipped"):
        list(read_soft_weights(spoilt, load(spoilt / "model.pt")).weights())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "holds no checkpoints of the run; without"),
        (lambda run: damage(run, run_checkpoints.WEIGHTS), "checkpoint-4: cannot be read"),
        (lambda run: damage(run, "complete.json"), "checkpoint-4: cannot be read"),
    ],
    ids=["no checkpoints", "damaged weights", "damaged mark"],
)
def test_state_that_is_gone_or_damaged(spoil, reason, spoilt):
    spoil(spoilt)
    with pytest.raises(InputError, match=reason):
        read_soft_weights(spoilt, load(spoilt / "model.pt"))


def damage(folder: Path, name: str) -> None:
    path = run_checkpoints.last_complete(folder / "checkpoints") / name
    path.write_bytes(b"{ torn")


def test_run_that_kept_no_state(tmp_path):
    run(tmp_path / "run", {"save_every": 0, "steps": 1})
    with pytest.raises(InputError, match="run: was trained with --save-every 0; without its last state"):
        read_soft_weights(tmp_path / "run", load(tmp_path / "run" / "model.pt"))


@pytest.mark.slow
def test_run_with_large_luts_only(tmp_path):
    run(tmp_path / "run", {"bits": 6, "steps": 1})
    with pytest.raises(InputError, match="trained no weight with a LUT of 16 entries or less"):
        read_soft_weights(tmp_path / "run", load(tmp_path / "run" / "model.pt"))


# The command


@pytest.mark.slow
def test_verify_compares_the_soft_model_of_the_run(edkm, spoilt, tmp_path):
    pytest.importorskip("coremltools")
    model, made = spoilt / "model.pt", tmp_path / "package"
    assert edkm("coreml", model, "-o", made, "--interface", "logits", "--no-verify").status == 0

    def rungs(*arguments: object) -> dict[str, Rung]:
        report = tmp_path / "report"
        result = edkm("verify", *arguments, "--text", HELDOUT, "--tokens", 64, "--report", report)
        assert result.status == 0, result.err
        text = (report / "report.json").read_text(encoding="utf-8")
        return {rung.id: rung for rung in Report.model_validate_json(text).rungs}

    found = rungs(model, made)
    assert found["soft"].verdict is found["hardening"].verdict is Verdict.REPORTED
    assert "a by-product" in found["soft"].detail
    alone = Path(shutil.copy(model, tmp_path / "alone.pt"))
    assert rungs(alone, made, "--run", spoilt)["hardening"].measures == found["hardening"].measures
    found = rungs(alone, made)
    assert found["soft"].verdict is Verdict.NOT_RUN and "hardening" not in found
    assert "holds no checkpoints of the run" in found["soft"].detail
    result = edkm("verify", alone, made, "--run", tmp_path)
    assert result.status == 2 and "holds no checkpoints of the run" in result.message
