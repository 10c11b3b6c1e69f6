"""Palettize a random model of Llama-3.2-1B's shape (1.24B parameters): time and peak memory.

Users report 40-50 GB for this with coremltools' k-means (coremltools issue 2551).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
import torch

from benchmarks.measure import measure

SECONDS = 25 * 60
PEAK_BYTES = 2 * 1.2358e9 + 1.5e9  # the float16 model and 1.5 GB
TOKENIZER = Path(__file__).parent.parent / "fixtures" / "tiny-llama"


def make_model(folder: Path) -> None:
    """Write random float16 weights, drawn one tensor at a time."""
    import safetensors.torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        dtype="float16",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).named_parameters()
        }
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
        state[name] = tensor.half()
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--bits", default=4, show_default=True)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), help="Calibrate as well.")
def main(folder: Path, bits: int, calibration: Path | None) -> None:
    if not (folder / "model.safetensors").is_file():
        measure(
            [
                sys.executable,
                "-c",
                "from pathlib import Path; from benchmarks.llama_1b import make_model; "
                f"make_model(Path({str(folder)!r}))",
            ]
        )
    command = [sys.executable, "-m", "edkm_export", "palettize", str(folder), "--bits", str(bits)]
    command += ["-o", str(folder / "llama-1b.pt"), "--overwrite"]
    command += ["--calibration", str(calibration)] if calibration else []
    found = measure(command)
    print(
        f"palettize at {bits} bits: {found.seconds / 60:.1f} min (at most {SECONDS / 60:.0f}), "
        f"peak {found.peak_bytes / 1e9:.2f} GB (at most {PEAK_BYTES / 1e9:.2f})"
    )
    sys.exit(found.status or int(found.seconds > SECONDS or found.peak_bytes > PEAK_BYTES))


if __name__ == "__main__":
    main()
