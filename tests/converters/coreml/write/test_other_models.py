"""`convert` on models that are no decoders: what it takes is a module, examples and palettes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import edkm_export
from converters.coreml import convert, load_package, save_package
from edkm_export.errors import ConversionError, InputError, OutputExistsError
from edkm_export.palette import PalettizedTensor
from tests.helpers.palettes import numpy_decode, random_palette

pytest.importorskip("coremltools")


class Encoder(nn.Module):
    """transformers' BERT, its mask made by hand: the one of transformers does not trace."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.BertConfig(
            vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=32,
        )  # fmt: skip
        torch.manual_seed(0)
        self.bert = transformers.BertModel(config, add_pooling_layer=False).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert.embeddings(input_ids)
        mask = (1.0 - attention_mask[:, None, None, :]) * -1e4
        for layer in self.bert.encoder.layer:
            found = layer(hidden, attention_mask=mask)
            hidden = found[0] if isinstance(found, tuple) else found
        return hidden


class ConvNet(nn.Module):
    """Convolutions, one of them depthwise, norms and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GroupNorm(4, 16), nn.SiLU(),
            nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.classifier = nn.Linear(24, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.body(image))


def with_palettes(module: nn.Module) -> dict[str, PalettizedTensor]:
    """Give every Linear, Conv2d and Embedding random palettes; the module then holds their values.

    Positions and token types are left out: what BERT looks up there is constant, and the converter folds it.
    """
    palettes = {}
    for name, layer in module.named_modules():
        if name.endswith(("position_embeddings", "token_type_embeddings")):
            continue
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding)):
            shape = tuple(layer.weight.shape)
            groups = (shape[0] // 8, 1) if shape[0] % 8 == 0 else (1, 1)
            drawn = random_palette(shape, 4, groups, name=f"{name}.weight", seed=len(palettes))
            lut = (drawn.lut.float() * 0.1).half()  # so that activations stay near one
            palette = dataclasses.replace(drawn, lut=lut)
            layer.weight.data = torch.from_numpy(numpy_decode(palette)).float()
            palettes[palette.name] = palette
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
    return palettes


CASES = {
    "BERT": (
        Encoder,
        (torch.arange(14, dtype=torch.int32)[None] * 5, torch.cat((torch.ones(1, 11), torch.zeros(1, 3)), 1)),
        13,  # tokens, and two layers of six
    ),
    "convolutions": (
        ConvNet,
        (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).half().float(),),
        4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_traced_model(case: str, tmp_path: Path):
    kind, examples, count = CASES[case]
    module = kind().eval().requires_grad_(False)
    palettes = with_palettes(module)
    save_package(convert(module, examples, palettes), tmp_path / "model.mlpackage")
    package = load_package(tmp_path / "model.mlpackage")
    found = package.palettized()
    assert len(found) == count and found.keys() == palettes.keys()
    assert all(palette.same_bits(found[name]) for name, palette in palettes.items())
    names = {"BERT": ["input_ids", "attention_mask"], "convolutions": ["image"]}[case]
    outputs = package.run(dict(zip(names, examples, strict=True)))
    (output,) = outputs.values()
    # float32 arithmetic with the same weights; the program holds other constants, such as epsilons, in float16
    torch.testing.assert_close(output, module(*examples), rtol=2e-3, atol=2e-3)


def bert(kind: str = "BertModel", **settings: Any) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


IDS = torch.arange(14)[None] * 5
MASK = torch.cat((torch.ones(1, 11), torch.zeros(1, 3)), 1).long()


@pytest.mark.parametrize(
    ("kind", "settings", "examples", "names"),
    [
        ("BertModel", {}, (IDS,), ["last_hidden_state", "pooler_output"]),
        ("BertModel", {}, {"attention_mask": MASK, "input_ids": IDS}, ["last_hidden_state", "pooler_output"]),
        (
            "BertForSequenceClassification",
            {"output_hidden_states": True},
            {"input_ids": IDS.tolist(), "attention_mask": MASK.numpy()},
            ["hidden_states_0", "hidden_states_1", "hidden_states_2", "logits"],
        ),
    ],
    ids=["ids", "mask", "nested outputs"],
)
def test_model_with_a_dictionary(
    kind: str, settings: dict[str, Any], examples: Any, names: list[str], tmp_path: Path
):
    """transformers' own forward pass, mask included, through the door of `import edkm_export`."""
    module = bert(kind, **settings)
    checkpoint = edkm_export.palettize(module, calibration=IDS.flatten().tolist(), bits=4)
    exported = edkm_export.export(
        checkpoint, tmp_path / "bert.mlpackage", module=module, example_inputs=examples
    )
    package = load_package(str(exported.path))
    found = package.palettized()
    assert found.keys() == checkpoint.palettized.keys() and len(found) >= 13
    assert all(palette.same_bits(found[name]) for name, palette in checkpoint.palettized.items())
    inputs = examples if isinstance(examples, dict) else {"input_ids": examples[0]}
    outputs = package.run(inputs)
    assert sorted(outputs) == names
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    expected = edkm_export.decoded_module(checkpoint, module)(**tensors)
    flat = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    flat |= {
        f"hidden_states_{place}": value for place, value in enumerate(expected.get("hidden_states") or ())
    }
    for name in names:  # rtol and atol as above
        torch.testing.assert_close(outputs[name], flat[name], rtol=2e-3, atol=2e-3)


class Outputs(NamedTuple):
    scores: Tensor
    features: Tensor


class Norms(nn.Module):
    """A network in which the converter would fold norms into weights, and whose outputs have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.BatchNorm2d(16),
        )
        for norm in (self.body[1], self.body[4]):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Outputs:
        features = self.body(image).mean((2, 3))
        return Outputs(self.head(features), features)


def test_norms_stay_out_of_palettized_weights(tmp_path: Path):
    module = Norms().eval()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).half().float()
    checkpoint = edkm_export.palettize(module, calibration=images, bits=3)
    path = tmp_path / "cnn.mlpackage"
    exported = edkm_export.export(checkpoint, str(path), module=module, example_inputs=images[:1])
    assert repr(exported).startswith(f"Exported({path}, Core ML of a Norms, ")
    package = load_package(path)
    assert all(
        palette.same_bits(package.palettized()[name]) for name, palette in checkpoint.palettized.items()
    )
    outputs = package.run({"image": images[:1].numpy()})
    expected = edkm_export.decoded_module(checkpoint, module)(images[:1])
    torch.testing.assert_close(outputs["scores"], expected.scores, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(outputs["features"], expected.features, rtol=2e-3, atol=2e-3)
    with pytest.raises(OutputExistsError, match="already exists"):
        edkm_export.export(checkpoint, path, module=module, example_inputs=images[:1])


def test_a_mask_that_would_be_another_is_refused():
    """A decoder adds the causal mask; the mask of an encoder in its place would show the future."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=80, n_embd=32, n_layer=1, n_head=2, n_positions=32, use_cache=False
    )
    torch.manual_seed(0)
    module = transformers.GPT2Model(config).eval()
    with pytest.raises(
        ConversionError, match="GPT2Model: does not attend to all tokens that attention_mask shows"
    ):
        convert(module, {"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}, {})


def test_a_cache_is_no_output():
    import transformers

    config = transformers.GPT2Config(vocab_size=80, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    module = transformers.GPT2Model(config).eval()
    with pytest.raises(
        ConversionError, match=r"is a DynamicCache, expected tensors; set config\.use_cache = False"
    ):
        convert(module, (IDS,), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give the module that it was made of"),
        ({"module": nn.Linear(4, 4)}, "is traced with example_inputs="),
        ({"example_inputs": (torch.ones(1, 4),)}, "example_inputs: belong to a module"),
        ({"format": "tflite"}, "format: is 'tflite', expected 'coreml' or 'onnx' or 'coreai'"),
        ({"runtime": "fast"}, "runtime: is an option of format 'onnx', and the format is 'coreml'"),
        (
            {"module": nn.Linear(4, 4), "example_inputs": (torch.ones(1, 4),)},
            "name the package of a module NAME.mlp",
        ),
        (
            {"module": nn.Linear(4, 4), "example_inputs": (torch.ones(1, 4),), "format": "onnx"},
            "exported to 'coreml' only",
        ),
    ],
)
def test_export_refuses(options: dict[str, Any], message: str, tmp_path: Path):
    checkpoint = edkm_export.palettize(nn.Linear(4, 4), bits=2)
    with pytest.raises(InputError) as caught:
        edkm_export.export(checkpoint, tmp_path / "out", **options)
    assert message in str(caught.value) and not any(tmp_path.iterdir())
