"""A model of LLaMA-7B's shape with random weights: in memory, parameter by parameter, and as a folder."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from benchmarks.llama_stack import LLAMA_7B, SMALL
from edkm_export.reference.float_weights import FloatWeights

__all__ = ["FIXTURES", "random_weights", "write_model"]

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def random_weights(layers: int, small: bool, device: str) -> FloatWeights:
    """The outline of a LLaMA-7B, and random values for each parameter, the same in each process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = SMALL if small else LLAMA_7B
    config = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        vocab_size=1024 if small else 32000,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config).eval()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def values(name: str) -> Tensor:
        if "norm" in name:
            return torch.ones(shapes[name], device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shapes[name], device=device).normal_(0.0, 0.02, generator=generator)

    return FloatWeights("LLaMA-7B", model, values, torch.float32, {})


def write_model(weights: FloatWeights, folder: Path) -> None:
    """A Hugging Face folder with a file for each few layers."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    placed: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name, _ in weights.model.named_parameters():
        number = name.split(".")[2] if ".layers." in name else "outer"
        part = f"{int(number) // 8}" if number.isdigit() else number
        parts.setdefault(part, []).append(name)
    for part, names in parts.items():
        file = f"model-{part}.safetensors"
        save_file(
            {name: weights.stored(name).bfloat16().cpu() for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        placed |= dict.fromkeys(names, file)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = weights.model.config.to_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / "tiny-llama" / name, folder / name)
