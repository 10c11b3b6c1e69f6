from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edkm_export
from edkm_export import Checkpoint, PalettizedTensor
from edkm_export.errors import EdkmExportError, InputError, PaletteError, RecipeError
from edkm_export.reference.source import Source, load_model, load_tokenizer
from tests.helpers.odd_models import build
from tests.helpers.paths import ROOT

TEXTS = ["Once upon a time there was a weight that mattered. " * 20, "Another one did not. " * 20]


@pytest.fixture(scope="module")
def model(small_folder) -> Any:
    return load_model(Source.parse(small_folder))


@pytest.fixture(scope="module")
def tokenizer(small_folder) -> Any:
    return load_tokenizer(Source.parse(small_folder))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )  # fmt: skip


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return (
        one.palettized.keys() == other.palettized.keys()
        and all(tensor.same_bits(other.palettized[name]) for name, tensor in one.palettized.items())
        and one.dense.keys() == other.dense.keys()
        and all(torch.equal(tensor, other.dense[name]) for name, tensor in one.dense.items())
        and one.tied == other.tied
    )


def test_import_takes_no_torch():
    code = "import sys, edkm_export; dir(edkm_export); print(sorted({'torch', 'numpy', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there():
    for name in edkm_export.__all__:
        assert getattr(edkm_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'palettise'"):
        _ = edkm_export.palettise


def test_verify_is_a_package_and_a_function(tmp_path):
    from edkm_export.verify.report import Report

    assert edkm_export.verify.report.Report is Report
    with pytest.raises(
        InputError, match="does not say which checkpoint it was exported from; give checkpoint="
    ):
        edkm_export.verify(tmp_path)


# Language models


def test_command_path_and_memory_agree(edkm, small_folder, model, tokenizer, work):
    """The command, a path and the model itself: one checkpoint, down to configuration and tokenizer."""
    text = TEXTS[0]
    (work / "text.txt").write_text(text)
    edkm(
        "palettize",
        small_folder,
        "--calibration",
        "text.txt",
        "--bits",
        "3",
        "--no-estimate",
        "-o",
        "command.pt",
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    made = {
        "command": edkm_export.load("command.pt"),
        "path": edkm_export.palettize(str(small_folder), calibration="text.txt", bits=3),
        "memory": edkm_export.palettize(model, tokenizer, calibration=[text], bits=3),
    }
    assert model.training and all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items()
    )
    for name, checkpoint in made.items():
        if name != "command":
            checkpoint.save(f"{name}.pt")
            assert same(checkpoint, edkm_export.load(f"{name}.pt"))
    assert made["memory"].provenance["base_model"]["reference"] == "LlamaForCausalLM in memory"
    made = {name: edkm_export.load(f"{name}.pt") for name in made}
    for checkpoint in made.values():
        assert same(checkpoint, made["command"])
        assert checkpoint.config == made["command"].config and checkpoint.recipe == made["command"].recipe
        assert checkpoint.tokenizer == made["command"].tokenizer
        assert (
            checkpoint.provenance["calibration"]["tokens"]
            == made["command"].provenance["calibration"]["tokens"]
        )


def test_estimate(model, tokenizer):
    """On text that calibration did not see; the model keeps its weights."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = edkm_export.palettize(model, tokenizer, calibration=TEXTS, bits=2, estimate=True)
    found = made.provenance["estimate"]
    assert found["tokens"] >= 32 and found["perplexity_ratio"] > 0 and 0 <= found["top1"] <= 1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_forms_of_calibration(model, tokenizer):
    """Texts, rows of a dataset and token ids, whatever holds them, give one checkpoint."""
    text = "\n\n".join(TEXTS)
    ids = tokenizer(text)["input_ids"]
    forms: dict[str, Any] = {
        "strings": TEXTS,
        "generator": (row for row in TEXTS),
        "rows": [{"text": row, "label": 0} for row in TEXTS],
        "ids": ids,
        "array": np.array(ids, np.int32),
        "tensor": torch.tensor([ids]),
        "rows of ids": [{"input_ids": ids[:50]}, {"input_ids": ids[50:]}],
        "tokenizer": tokenizer(text),
    }
    made = {
        name: edkm_export.palettize(model, tokenizer, calibration=given, bits=2, calibration_tokens=300)
        for name, given in forms.items()
    }
    plain = edkm_export.palettize(model, tokenizer, bits=2)
    assert not same(plain, made["strings"])
    assert all(same(checkpoint, made["strings"]) for checkpoint in made.values())


def test_recipes(model):
    rules = {"name": "mine", "rules": [{"match": "*", "bits": 2, "group_size": 8}]}
    assert {tensor.n_bits for tensor in edkm_export.palettize(model, recipe=rules).palettized.values()} == {2}
    assert edkm_export.palettize(model, recipe="3bit-int4").recipe["name"] == "3bit-int4"
    assert (
        edkm_export.palettize(model, recipe=edkm_export.Recipe.model_validate(rules)).recipe["name"] == "mine"
    )


def with_nan(module: nn.Module) -> nn.Module:
    next(module.parameters()).data[0, 0] = float("nan")
    return module


def with_adapter() -> nn.Module:
    module = cnn()
    module.merge_and_unload = lambda: module  # type: ignore[assignment]
    return module


REFUSED: dict[str, tuple[Any, dict[str, Any], type[EdkmExportError], str]] = {
    "number": (5, {}, InputError, "model: is int, expected a path or hub id, a torch.nn.Module or a tensor"),
    "None": (None, {}, InputError, "model: is NoneType"),
    "missing path": ("./nope", {}, InputError, "./nope: no such file or folder"),
    "no weights": (nn.ReLU(), {}, InputError, "ReLU: has no linear, embedding or convolution layer"),
    "bits 5": (cnn(), {"bits": 5}, RecipeError, "no deployment target can hold 5 bits"),
    "bits 5 of a weight": (torch.ones(4, 4), {"bits": 5}, RecipeError, "can hold 5 bits"),
    "bits 5 in a recipe": (cnn(), {"recipe": {"rules": [{"bits": 5}]}}, RecipeError, "rules.0.bits"),
    "recipe and bits": (cnn(), {"recipe": "4bit", "bits": 4}, RecipeError, "recipe decides bits"),
    "group size": (cnn(), {"group_size": 3}, PaletteError, "group_size 3 does not divide its 16 output rows"),
    "NaN in a layer": (with_nan(nn.Linear(4, 4)), {}, InputError, "Linear: weight holds NaN"),
    "NaN in a weight": (torch.full((2, 2), float("nan")), {}, InputError, "weight: holds NaN or infinity"),
    "integers": (torch.ones(4, 4, dtype=torch.int8), {}, InputError, "weight: is int8 [4, 4], expected floating"),
    "a bias": (torch.ones(4), {}, InputError, "float32 [4], expected floating point with at least two axes"),
    "integer array": (np.ones((4, 4), int), {}, InputError, "weight: is int64 [4, 4]"),
    "meta": (nn.Linear(4, 4, device="meta"), {}, InputError, "weight has no values (it is on the meta device)"),
    "adapter": (with_adapter(), {}, InputError, "merge it first: model.merge_and_unload()"),
    "weight norm": (
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {}, InputError, "its weight is no parameter",
    ),
    "text for a CNN": (cnn(), {"calibration": "some text"}, InputError, "give example inputs"),
    "wrong inputs": (cnn(), {"calibration": torch.ones(2, 2)}, InputError, "cannot be called with calibration batch 0"),
    "no inputs": (cnn(), {"calibration": []}, InputError, "calibration: is empty"),
    "nothing to skip": (cnn(), {"skip": ["head"]}, RecipeError, "no module matches 'head'"),
    "inputs of another layer": (torch.ones(4, 8), {"calibration": torch.ones(3, 4)}, InputError, "[..., 8]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    given, options, kind, message = REFUSED[case]
    with pytest.raises(kind) as caught:
        edkm_export.palettize(given, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("missing.txt", "no such text file: 'missing.txt'; text itself goes in a list: calibration=[text]"),
        ([], "calibration: is empty"),
        ([" "], "calibration: its texts are empty"),
        ([1.5, 2], "calibration: item 0 is 1.5"),
        (["one", 2], "row 1 is int, expected a string as in row 0"),
        ([{"sentence": "one"}], "its rows have the columns sentence, expected 'text' or 'input_ids'"),
        ({"train": ["one"]}, "is a mapping of train; give one of its parts"),
        ([5], "gives 1 token, at least 32 are needed"),
        ([5] * 40 + [100_000], "token 100000 is beyond the model's vocabulary of 320"),
        ([5, -1], "id -1 is negative"),
        (7, "calibration: is int"),
    ],
)
def test_calibration_that_is_refused(calibration, message, model, tokenizer):
    with pytest.raises(InputError) as caught:
        edkm_export.palettize(model, tokenizer, calibration=calibration)
    assert message in str(caught.value)


def test_text_takes_a_tokenizer(model, small_folder):
    with pytest.raises(InputError, match="takes a tokenizer"):
        edkm_export.palettize(model, calibration=TEXTS)
    with pytest.raises(InputError, match="tokenizer: is int, expected a tokenizer of transformers"):
        edkm_export.palettize(model, 3, calibration=TEXTS)  # type: ignore[call-overload]
    assert edkm_export.palettize(model, str(small_folder)).tokenizer


def test_a_changed_model_is_another_model():
    """What its configuration does not say would be missing in every export."""
    model = build("plain")
    model.model.layers[0].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.extra\.weight is \[4, 4\], but missing in a Llama"
    ):
        edkm_export.palettize(model)


# Modules and weights


def test_any_module():
    module = cnn().train()
    made = edkm_export.palettize(module, bits=3)
    assert module.training
    assert {name: tensor.shape for name, tensor in made.palettized.items()} == {
        "0.weight": (16, 3, 3, 3), "3.weight": (16, 1, 3, 3), "5.weight": (10, 256),
    }  # fmt: skip
    assert made.palettized["5.weight"].groups == (1, 1)  # 16 does not divide its rows
    decoded = edkm_export.decoded_module(made, module)
    for name, tensor in module.state_dict().items():
        expected = made.palettized[name].decode().float() if name in made.palettized else tensor
        assert torch.equal(decoded.state_dict()[name], expected), name
    with pytest.raises(InputError, match="it is another module"):
        edkm_export.decoded_module(made, nn.Linear(2, 2))


def test_a_layer_by_itself():
    made = edkm_export.palettize(nn.Conv1d(4, 16, 3), bits=2, group_size=8)
    assert made.palettized["weight"].groups == (2, 1) and made.dense.keys() == {"bias"}


def test_skip():
    made = edkm_export.palettize(cnn(), skip=["5"])
    assert made.palettized.keys() == {"0.weight", "3.weight"} and "5.weight" in made.dense


def output_error(calibration: Any) -> float:
    """Mean square error of the outputs of a CNN at 2 bits, in which some channels hardly matter."""
    module = cnn().eval()
    module[0].weight.data[:, 2] *= 30  # its input channel is dark: the largest weights do nothing
    dark = images(16) * torch.tensor([1.0, 1.0, 1e-4])[:, None, None]
    made = edkm_export.palettize(module, calibration=dark if calibration else None, bits=2)
    with torch.no_grad():
        return float((edkm_export.decoded_module(made, module)(dark) - module(dark)).square().mean())


def test_example_inputs_weigh_a_convolution():
    """Without them the centroids lie where weights are that meet no signal; measured: four times the error."""
    assert output_error(calibration=True) < output_error(calibration=False) / 2


def test_forms_of_example_inputs():
    made = [
        edkm_export.palettize(cnn(), calibration=given, bits=2)
        for given in (
            images(),
            (images(),),
            {"input": images()},
            [images()[:2], images()[2:]],
            images().numpy(),
        )
    ]
    assert all(same(checkpoint, made[0]) for checkpoint in made)


def test_one_weight():
    weight = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    made = edkm_export.palettize(weight, bits=3, name="w")
    assert isinstance(made, PalettizedTensor) and made.name == "w" and made.groups == (2, 1)
    assert made.same_bits(edkm_export.palettize(weight.numpy(), bits=3))
    assert made.same_bits(edkm_export.palettize(nn.Parameter(weight), bits=3))
    kernel = edkm_export.palettize(torch.randn(6, 2, 3, 3), bits=2)
    assert kernel.shape == (6, 2, 3, 3) and kernel.decode().shape == (6, 2, 3, 3)


def test_inputs_weigh_a_weight():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 8, generator=generator)
    weight[:, 0] *= 50
    inputs = torch.randn(40, 8, generator=generator)
    inputs[:, 0] = 0

    def error(made: PalettizedTensor) -> float:
        return float((inputs @ (made.decode().float() - weight).t()).square().mean())

    weighted = edkm_export.palettize(weight, bits=2, calibration=inputs)
    assert error(weighted) < error(edkm_export.palettize(weight, bits=2)) / 3


# One line


def test_one_line_each(small_folder, tmp_path: Path):
    made = edkm_export.palettize(small_folder, bits=4)
    words = repr(made)
    assert words.startswith("Checkpoint(llama, ") and "palettized at 4-8 bits" in words and "\n" not in words
    name, weight = next(iter(made.palettized.items()))
    assert repr(weight).startswith(f"PalettizedTensor({name}, 320x32, 8 bits, 1 float16 LUT, ")
    assert repr(edkm_export.palettize(cnn())).startswith("Checkpoint(")
