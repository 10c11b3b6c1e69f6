"""`convert` on models that are no decoders: what it takes is a module, examples and palettes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from converters.coreml import convert, load_package, save_package
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
