"""What a row is given and what it hands back, for programs that run in a peer's own environment.

    PYTHON benchmarks/peers/NAME.py TASK.json

The task names a folder with the float model (safetensors), calibration text and windows, bits, device and seed. The
row writes the weights as they decode, and what each takes in bits. Nothing of this project is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A row's task.

    Attributes:
        model: folder with config, weights and tokenizer.
        text: calibration text.
        windows: its tokens, int64 [windows, context].
        bits: of a weight, nominal.
        device: "cpu" or "cuda".
        minutes: for rows that train.
        seed: of the row.
        output: folder for `weights.safetensors` and `row.json`.
    """

    model: Path
    text: Path
    windows: Tensor
    bits: int
    device: str
    minutes: float
    seed: int
    output: Path
    extra: dict[str, str]

    @classmethod
    def read(cls) -> Task:
        """The task that the command line names; the seed is set."""
        given = json.loads(Path(sys.argv[1]).read_text())
        windows = torch.tensor(json.loads(Path(given["windows"]).read_text()))
        torch.manual_seed(given["seed"])
        return cls(
            Path(given["model"]), Path(given["text"]), windows, given["bits"], given["device"], given["minutes"],
            given["seed"], Path(given["output"]), given["extra"],
        )  # fmt: skip

    def load(self) -> Any:
        """The float32 model, on the device."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        return model.to(self.device).eval()

    def tokenizer(self) -> Any:
        """Of the model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model, local_files_only=True, trust_remote_code=False)

    def finish(
        self, weights: dict[str, Tensor], bits: dict[str, float], settings: str, *packages: str
    ) -> None:
        """Hand back the weights that changed, by name of the parameter.

        Args:
            weights: as they decode, float [out, in].
            bits: storage of each in bits, indices, scales, zero points and LUTs.
            settings: the peer's, in words.
            packages: whose versions are printed.
        """
        from safetensors.torch import save_file

        assert weights.keys() == bits.keys() and weights, "nothing was quantized"
        kept = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in weights.items()}
        save_file(kept, self.output / "weights.safetensors")
        versions = {name: importlib.metadata.version(name) for name in (*packages, "torch", "transformers")}
        record = {"bits": bits, "settings": settings, "versions": versions}
        (self.output / "row.json").write_text(json.dumps(record))


def inner_layers(model: Any) -> dict[str, nn.Linear]:
    """{name: linear layer} of the decoder, without embedding and head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def affine_bits(shape: tuple[int, ...], bits: int, group: int, *, zero_point: bool) -> float:
    """Storage of groups of `group` inputs with a float16 scale, and a zero point of the bits of a weight."""
    count = shape[0] * shape[1]
    groups = shape[0] * -(-shape[1] // group)
    return count * bits + groups * (16 + (bits if zero_point else 0))


def lut_bits(shape: tuple[int, ...], bits: int, group_rows: int) -> float:
    """Storage of indices and of a float16 LUT for each `group_rows` rows (0: one for all)."""
    groups = shape[0] // group_rows if group_rows else 1
    return shape[0] * shape[1] * bits + groups * 2**bits * 16


def fitting_rows(rows: int, wanted: int = 16) -> int:
    """The largest divisor of the rows that is no larger than what is wanted."""
    return max(size for size in range(1, wanted + 1) if rows % size == 0)
