"""Peak memory of each command for a large model, with and without a limit (--memory): random weights, two cores.

    python -m benchmarks.large_models FOLDER --shape 1b --memory 2GB
    python -m benchmarks.large_models FOLDER --shape 7b --memory 16GB --without-whole

Makes the model where it is not there yet, in one file a layer, palettizes it at 4 bits, without and with each --memory,
exports it to Core ML, and verifies it: whole, and with each --memory. Accuracy is not measured, since weights are
random. Memory is the largest resident set that the system counted, pages of mapped files included, which it can take
back at any time.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.llama_1b import TOKENIZER
from benchmarks.measure import Measured, measure

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""Llama-3.2-1B, LLaMA-7B, and one to try the script."""

_ENDLESS = "1000GB"


def make_model(folder: Path, shape: str) -> None:
    """Write random float16 weights, one layer at a time, each into a file of its own."""
    import safetensors.torch
    import transformers

    config = transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, dtype="float16")
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "outer"
        files.setdefault(f"model-{part}.safetensors", {})[name] = parameter.shape
    for file, shapes in files.items():
        state = {
            name: (
                torch.randn(size, generator=generator) * 0.02 if len(size) > 1 else torch.ones(size)
            ).half()
            for name, size in shapes.items()
        }
        safetensors.torch.save_file(state, folder / file, metadata={"format": "pt"})
    placed = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    for tokenizer in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / tokenizer, folder / tokenizer)


def edkm(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edkm_export", *map(str, arguments)]


def report(what: str, found: Measured) -> None:
    state = "" if found.status in (0, 1) else f", status {found.status}"
    print(f"{what}: {found.seconds:,.0f} s, peak {found.peak_bytes / 1e9:.2f} GB{state}", flush=True)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b", show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Of the verification.")
@click.option("--memory", "memories", multiple=True, help="Limit, such as 2GB.")
@click.option("--interface", default="neural-engine", show_default=True, help="Of the Core ML export.")
@click.option("--chunks", default="auto", show_default=True, help="Of the Core ML export.")
@click.option("--without-whole", is_flag=True, help="Leave out the verification without a limit.")
def main(
    folder: Path,
    shape: str,
    tokens: int,
    memories: tuple[str, ...],
    interface: str,
    chunks: str,
    without_whole: bool,
) -> None:
    model, checkpoint, package = folder / "model", folder / "model.pt", folder / "coreml"
    if not model.is_dir():
        code = (
            "from pathlib import Path; from benchmarks.large_models import make_model; "
            f"make_model(Path({str(model)!r}), {shape!r})"
        )
        report("making the model", measure([sys.executable, "-c", code]))
    if not checkpoint.is_file():
        # a command takes what is free by default: more than there is means whole
        limit = memories[0] if without_whole else _ENDLESS
        arguments = ("--bits", 4, "--memory", limit, "-o", checkpoint)
        report(f"palettize, --memory {limit}", measure(edkm("palettize", model, *arguments)))
    for memory in memories[1 if without_whole else 0 :]:
        output = ("-o", folder / f"model-{memory}.pt", "--overwrite")
        report(
            f"palettize, --memory {memory}",
            measure(edkm("palettize", model, "--bits", 4, "--memory", memory, *output)),
        )
    if not package.is_dir():
        arguments = ("--interface", interface, "--chunks", chunks, "--no-verify", "-o", package)
        report("coreml", measure(edkm("coreml", checkpoint, *arguments)))
    for memory in [*([] if without_whole else [_ENDLESS]), *memories]:
        place = folder / f"report-{memory}"
        arguments = ("--tokens", tokens, "--memory", memory, "--report", place)
        report(f"verify, --memory {memory}", measure(edkm("verify", checkpoint, package, *arguments)))


if __name__ == "__main__":
    main()
