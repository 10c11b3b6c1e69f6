"""Import of palettes; the finalized models are made by coremltools itself."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edkm_export import checkpoint
from edkm_export.errors import CheckpointError
from edkm_export.importing import import_state, read_state
from edkm_export.model_card import License, base_models, license_of
from tests.helpers.odd_models import build

pytest.importorskip("coremltools")

FORMS: dict[str, dict[str, Any]] = {
    "4 bits": {"n_bits": 4},
    "groups of rows": {"n_bits": 3, "granularity": "per_grouped_channel", "group_size": 8},
    "groups of columns": {
        "n_bits": 2, "granularity": "per_grouped_channel", "group_size": 8, "channel_axis": 1,
    },
    "scale for each channel": {"n_bits": 4, "enable_per_channel_scale": True},
    "vectors": {"n_bits": 4, "cluster_dim": 2},
    "int8 LUT": {"n_bits": 4, "lut_dtype": torch.int8},
}  # fmt: skip


def finalized(model: nn.Module, **config: Any) -> nn.Module:
    """What coremltools' post-training palettization makes of it."""
    from coremltools.optimize.torch.palettization import (
        PostTrainingPalettizer,
        PostTrainingPalettizerConfig,
    )

    logging.getLogger("coremltools").setLevel(logging.ERROR)
    settings = PostTrainingPalettizerConfig.from_dict({"global_config": config})
    return PostTrainingPalettizer(model, settings).compress(num_kmeans_workers=1)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 64))


@pytest.mark.parametrize("form", FORMS)
def test_finalized_model_keeps_its_values(form):
    state = finalized(small(), **FORMS[form]).state_dict()
    found = import_state(state, "state.pt")
    assert found.palettized.keys() == {"0.weight", "1.weight", "3.weight"}
    assert found.dense.keys() == {"1.bias", "3.bias"}
    # The LUT is rounded to float16, and with int8 its scale is: half a unit in the last place of float16, twice.
    for name, tensor in found.palettized.items():
        limit = 2.0**-10 * state[name].abs().max() if "int8" in form else 2.0**-11 * state[name].abs()
        assert ((tensor.decode().float() - state[name]).abs() <= limit + 2.0**-24).all(), name
    if form == "4 bits":  # the oracle: rounding what coremltools holds, and nothing else
        assert torch.equal(found.palettized["1.weight"].decode(), state["1.weight"].half())
    groups = {name: tensor.groups for name, tensor in found.palettized.items()}
    expected = {
        "groups of rows": (6, 1), "groups of columns": (1, 4), "scale for each channel": (48, 1),
    }  # fmt: skip
    assert groups["1.weight"] == expected.get(form, (1, 1))
    assert found.palettized["1.weight"].dim == (2 if form == "vectors" else 1)
    assert (found.palettized["1.weight"].lut_scale is not None) == (form == "int8 LUT")


def test_weights_of_few_values_are_palettes():
    torch.manual_seed(1)
    tables = torch.randn(4, 5).half().float()
    rows = torch.stack([tables[row // 2][torch.randint(5, (16,))] for row in range(8)])
    state = {"a.weight": rows, "a.bias": torch.randn(8)}
    found = import_state(state, "state.pt", group_size=2).palettized["a.weight"]
    assert found.n_bits == 3 and found.groups == (4, 1)
    assert torch.equal(found.decode().float(), rows)


def test_changed_weight_is_refused():
    state = finalized(small(), n_bits=4).state_dict()
    state["1.weight"][3, 4] += 1e-3
    with pytest.raises(CheckpointError, match="state.pt: 1.weight: holds .* which is no entry of its LUT"):
        import_state(state, "state.pt")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("compression_type", torch.tensor([1, 2]), r"compression types are \[1, 2\]"),
        ("lut", torch.zeros(3, 1, 16, 1), "no entry of its LUT"),
        ("lut", torch.zeros(5, 1, 16, 1), "does not fit its shape"),
        ("lut", torch.zeros(16), "does not fit its shape"),
    ],
)
def test_buffers_that_do_not_fit(key, value, message):
    state = finalized(small(), n_bits=4).state_dict()
    state[f"1._COREML_/weight/{key}"] = value
    with pytest.raises(CheckpointError, match=message):
        import_state(state, "state.pt")


def test_dense_model_is_refused():
    with pytest.raises(CheckpointError, match="no weight has a palette"):
        import_state(small().state_dict(), "state.pt")


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_the_file_is_not_run(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Touch(tmp_path / "touched")}))
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "evil.pt")
    torch.save({"a": Touch(tmp_path / "touched")}, tmp_path / "zipped.pt")
    with pytest.raises(CheckpointError, match=r"save the finalized model's state_dict\(\)"):
        read_state(tmp_path / "zipped.pt")
    assert not (tmp_path / "touched").exists()


def test_from_a_finalized_llama_to_a_checkpoint(edkm, small_folder, tmp_path, monkeypatch):
    """The command; what it writes computes what the finalized model does."""
    monkeypatch.chdir(tmp_path)
    model = finalized(build("untied_and_biased").float(), n_bits=4)
    torch.save(model.state_dict(), "finalized.pt")
    from tests.helpers.odd_models import save

    folder = save(build("untied_and_biased").half(), tmp_path / "source")
    (Path(folder) / "README.md").write_text("---\nlicense: mit\nbase_model: some-one/Small\n---\n")
    result = edkm("import", "finalized.pt", "--model", folder, "-o", "model.pt")
    assert result.status == 0, result.err
    made = checkpoint.load(Path("model.pt"))
    assert license_of(made) == License("mit", "", "", "its model card") and base_models(made) == [
        "some-one/Small"
    ]
    state = model.state_dict()
    assert made.palettized and all(
        torch.equal(tensor.decode(), state[name].half()) for name, tensor in made.palettized.items()
    )
    assert edkm("import", "finalized.pt", "--model", folder, "-o", "model.pt").status == 2
    assert edkm("import", "finalized.pt", "--model", small_folder, "-o", "other.pt").status == 2
