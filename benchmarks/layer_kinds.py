"""A cached decode step of each kind of layer in our interpreter of Core ML programs, against an equally large Llama.

python -m benchmarks.layer_kinds [--tokens N] [--interface NAME]

Models are random; their sizes are chosen so that parameters differ by a few percent at most.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from converters.coreml.read.session import CoreMLSession
from converters.coreml.write.export_plan import plan_export
from converters.coreml.write.packages import export_packages
from edkm_export.checkpoint import Checkpoint

_COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 1536}),
    "lfm2: 6 convolutions, 2 attentions": (
        "lfm2",
        {
            "intermediate_size": 1360,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "conv", "conv", "full_attention"] * 2,
        },
    ),
    "qwen3_5: 6 recurrences, 2 attentions": (
        "qwen3_5_text",
        {
            "intermediate_size": 1104,
            "head_dim": 64,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 8,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
        },
    ),
}
_PROMPT = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--interface", default="swift-transformers")
    given = parser.parse_args()
    print("| model | parameters | prompt of 64, s | decode step, ms | against Llama |\n|---|---|---|---|---|")
    base = 0.0
    for name, (kind, own) in _MODELS.items():
        model = random_model(kind, {**_COMMON, **own})
        parameters = sum(parameter.numel() for parameter in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            session = exported(model, Path(folder), given.interface)
            prompt, step = timed(session, given.tokens)
        base = base or step
        print(
            f"| {name} | {parameters / 1e6:.1f}M | {prompt:.2f} | {step * 1e3:.1f} | {step / base:.2f} |",
            flush=True,
        )


def random_model(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def exported(model: Any, folder: Path, interface: str) -> CoreMLSession:
    """With dense weights: the session decodes palettes once, so that a step costs the same with them."""
    config, dense, tied = model.config.to_dict(), {}, {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first == name:
            dense[name] = parameter.detach().half().contiguous()
        else:
            tied[name] = first
    checkpoint = Checkpoint(config=config, palettized={}, dense=dense, tied=tied)
    plan = plan_export(checkpoint, interface=interface, sequence_length=512)
    return CoreMLSession.open(export_packages(checkpoint, plan, folder, "model")[0])


def timed(session: CoreMLSession, tokens: int) -> tuple[float, float]:
    """Seconds of a prompt, after one that decoded the weights, and the median of single tokens behind it."""
    text = torch.randint(3, _COMMON["vocab_size"], (_PROMPT + tokens,))
    session.feed(text[:_PROMPT])
    session.reset()
    start = time.perf_counter()
    session.feed(text[:_PROMPT])
    prompt = time.perf_counter() - start
    steps = []
    for token in text[_PROMPT:].split(1):
        start = time.perf_counter()
        session.feed(token)
        steps.append(time.perf_counter() - start)
    return prompt, statistics.median(steps)


if __name__ == "__main__":
    main()
