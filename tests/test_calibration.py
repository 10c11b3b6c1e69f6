from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edkm_export.calibration import CalibrationText, input_energy
from edkm_export.errors import InputError
from tests.helpers.odd_models import build, inject_outliers

# Both sides compute in float32; they differ in the order of sums of 192 squares, 2e-7 as measured. Native 16-bit
# activations would be off by 5e-3 (float16) and 7e-2 (bfloat16).
TOLERANCE = 1e-5


def windows_of(vocab_size: int = 320) -> Tensor:
    """int64 [4, 48]"""
    return torch.randint(vocab_size, (4, 48), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def reference_energy(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Mean square of the inputs of each linear layer of the float32 model, float64 [in]."""
    model = copy.deepcopy(model).float()
    sums: dict[str, Tensor] = {}

    def record(name: str, args: tuple[Tensor]) -> None:
        energy = args[0].double().square().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, torch.zeros_like(energy)) + energy

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _module, args, name=name: record(name, args))
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    return {name: total / windows.numel() for name, total in sums.items()}


def bits_of(model: nn.Module) -> dict[str, tuple[torch.dtype, Tensor]]:
    return {
        name: (tensor.dtype, tensor.detach().clone().view(torch.uint8))
        for name, tensor in model.state_dict().items()
    }


def assert_unchanged(model: nn.Module, before: dict[str, tuple[torch.dtype, Tensor]]) -> None:
    after = bits_of(model)
    assert after.keys() == before.keys()
    for name, (dtype, content) in before.items():
        assert after[name][0] == dtype and torch.equal(after[name][1], content), name
    hooks = [
        name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]
    assert hooks == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["plain", "untied_and_biased", "gqa_4", "odd_sizes"])
def test_energy_is_that_of_the_float32_model(case, dtype):
    model = inject_outliers(build(case)).to(dtype)
    windows = windows_of(model.config.vocab_size)
    expected = reference_energy(model, windows)
    before = bits_of(model)
    found = input_energy(model, windows)
    assert_unchanged(model, before)
    assert found.keys() == expected.keys()  # every linear layer, the output head too
    for name, energy in found.items():
        assert energy.dtype == torch.float32 and energy.shape == (model.get_submodule(name).in_features,)
        torch.testing.assert_close(energy.double(), expected[name], rtol=TOLERANCE, atol=0)


def test_activations_beyond_float16_do_no_harm():
    model = build("plain").half()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 1000
        layer.mlp.down_proj.weight.data *= 1000
    windows = windows_of()
    with torch.no_grad():
        assert not model(windows).logits.isfinite().all()  # natively it overflows
    expected = reference_energy(model, windows)
    assert max(float(energy.max()) for energy in expected.values()) > 65504
    for name, energy in input_energy(model, windows).items():
        torch.testing.assert_close(energy.double(), expected[name], rtol=TOLERANCE, atol=0)


def test_energy_is_a_mean_over_all_tokens():
    model, windows = build("plain").half(), windows_of()
    whole = input_energy(model, windows)
    parts = [input_energy(model, window[None]) for window in windows]
    for name, energy in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(energy, mean, rtol=TOLERANCE, atol=0)


def test_one_short_window():
    model, windows = build("plain").half(), windows_of()[:1, :5]
    expected = reference_energy(model, windows)
    for name, energy in input_energy(model, windows).items():
        torch.testing.assert_close(energy.double(), expected[name], rtol=TOLERANCE, atol=0)


def test_progress_is_told_after_each_window():
    calls: list[int] = []
    input_energy(build("plain").half(), windows_of(), advance=lambda: calls.append(len(calls)))
    assert calls == [0, 1, 2, 3]


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm", "model.norm"]
)
def test_model_is_unchanged_after_an_exception_inside(where):
    model = build("untied_and_biased").half()
    before = bits_of(model)
    module = model.get_submodule(where)
    forward = module.forward

    def explode(*_args: Any) -> None:
        raise Boom

    module.forward = explode
    with pytest.raises(Boom):
        input_energy(model, windows_of())
    module.forward = forward
    assert_unchanged(model, before)
    assert input_energy(model, windows_of()).keys() == reference_energy(model, windows_of()).keys()


def test_model_is_unchanged_after_ctrl_c():
    model = build("plain").bfloat16()
    before = bits_of(model)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        input_energy(model, windows_of(), advance=interrupt)
    assert_unchanged(model, before)


def test_token_beyond_the_vocabulary_is_refused_before_it_is_looked_up():
    model = build("plain").half()
    windows = windows_of()
    windows[2, 3] = 320
    with pytest.raises(
        InputError, match="token 320 is beyond the model's vocabulary of 320: the tokenizer belongs"
    ):
        input_energy(model, windows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_model_is_refused_by_the_layer_that_it_reaches(value):
    model = build("plain")
    before_the_break = "model.layers.0.self_attn.q_proj"
    model.model.layers[0].mlp.down_proj.weight.data[3, 4] = value
    before = bits_of(model)
    with pytest.raises(
        InputError, match=": its input is not finite on the calibration text; the model is broken"
    ):
        input_energy(model, windows_of())
    with pytest.raises(InputError) as caught:
        input_energy(model, windows_of())
    assert not str(caught.value).startswith(before_the_break)
    assert_unchanged(model, before)


# Text that is held out


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text, **_options):
        return {"input_ids": [ord(character) for character in text]}


@pytest.mark.parametrize(
    ("length", "tokens", "wanted", "used", "held"),
    [
        (1000, 256, 100, 256, 100),  # behind what is calibrated on
        (384, 256, 512, 256, 128),  # fewer than were wanted, but enough
        (383, 256, 512, 256, 76),  # a fifth of all
        (100, 256, 512, 68, 32),
        (64, 256, 512, 32, 32),
        (63, 256, 512, 63, None),  # none to spare
        (1000, 256, 0, 256, None),
    ],
)
def test_what_is_held_out_is_not_calibrated_on(length, tokens, wanted, used, held):
    text = "".join(chr(1000 + place) for place in range(length))
    read = CalibrationText.read(text, Letters(), tokens=tokens, context=512, held_out=wanted, source="text")
    assert read.windows.shape == (1, used)
    assert (None if read.held_out is None else len(read.held_out)) == held
    if held is not None:
        assert int(read.windows.max()) < int(read.held_out.min())
