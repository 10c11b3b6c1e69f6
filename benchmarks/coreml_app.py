"""Each Core ML interface of one checkpoint: export, exactness, cache, greedy text and speed.

python -m benchmarks.coreml_app MODEL.PT OUTPUT [--interface NAME ...] [--export-only]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import measure
from converters.coreml.format import INTERFACES
from converters.coreml.read.artifact import open_artifact
from converters.coreml.read.folder import find_package
from converters.coreml.write.export_plan import plan_export
from edkm_export.artifact.generation import first_difference, generate
from edkm_export.artifact.protocol import Session
from edkm_export.artifact.thresholds import ROUNDED_TIE_NATS
from edkm_export.checkpoint import Checkpoint, load
from edkm_export.reference.hard_model import load_hard_tokenizer
from edkm_export.reference.torch_session import TorchSession

PROMPT = "The history of the printing press begins with"
NEW_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--interface", action="append", choices=INTERFACES)
    parser.add_argument("--export-only", action="store_true")
    given = parser.parse_args()
    checkpoint = load(given.checkpoint)
    for interface in given.interface or INTERFACES:
        folder = given.output / interface
        command = [
            sys.executable, "-m", "edkm_export", "coreml", str(given.checkpoint), "-o", str(folder),
            "--interface", interface, "--no-verify", "--overwrite",
        ]  # fmt: skip
        given.output.mkdir(parents=True, exist_ok=True)
        found = measure(command)
        assert not found.status, f"export failed with status {found.status}"
        print(
            f"## {interface}\nexport: {found.seconds:.0f} s, peak {found.peak_bytes / 1e9:.2f} GB "
            f"(float16 model: {checkpoint.numel * 2 / 1e9:.2f} GB)",
            flush=True,
        )
        sizes(checkpoint, interface, folder)
        if not given.export_only:
            compute(checkpoint, folder)


def sizes(checkpoint: Checkpoint, interface: str, folder: Path) -> None:
    """Weights on disk against the plan, and bit by bit against the checkpoint."""
    artifact = open_artifact(find_package(folder))
    predicted = plan_export(checkpoint, interface=interface).weights_size_bytes
    actual = artifact.weights_size_bytes()
    print(f"weights: {actual:,} bytes, predicted {predicted:,} ({actual / predicted - 1:+.3%})")
    found = artifact.palettized()
    equal = sum(
        name in found and tensor.same_bits(found[name]) for name, tensor in checkpoint.palettized.items()
    )
    print(f"bit-exact: {equal} of {len(checkpoint.palettized)}", flush=True)


@torch.no_grad()
def compute(checkpoint: Checkpoint, folder: Path) -> None:
    """Prefill against decode, greedy text, and speed, in the interpreter."""
    artifact = open_artifact(find_package(folder))
    tokenizer = load_hard_tokenizer(checkpoint)
    prompt = torch.tensor(tokenizer(PROMPT)["input_ids"])
    hard = TorchSession.of(checkpoint)
    reference = generate(hard, prompt, max_new_tokens=NEW_TOKENS)
    text = torch.cat((prompt, torch.tensor(reference.tokens)))
    hard.reset()
    expected = hard.feed(text).log_softmax(-1)
    del hard
    session = artifact.session()
    if session is None:
        print("no cache")
        return
    session.reset()
    split = len(prompt)
    pieces = [session.feed(text[:split]), *(session.feed(token[None]) for token in text[split:])]
    decoded = torch.cat(pieces).log_softmax(-1)
    divergence = float((expected.exp() * (expected - decoded)).sum(-1).max())
    print(f"prefill then decode against hard PyTorch's whole sequence: KL at most {divergence:.2g}")
    candidate = generate(session, prompt, max_new_tokens=NEW_TOKENS)
    difference = first_difference(reference.choices, candidate.choices)
    print(f"{NEW_TOKENS} greedy tokens: {'identical to hard PyTorch' if difference is None else difference}")
    speed(session, text)
    rounded = artifact.rounded_session()
    assert rounded is not None
    candidate = generate(rounded, prompt, max_new_tokens=NEW_TOKENS)
    difference = first_difference(reference.choices, candidate.choices)
    found = "identical" if difference is None else f"equal up to token {difference.place + 1}, {difference}"
    near = difference is None or difference.within(ROUNDED_TIE_NATS)
    print(f"{NEW_TOKENS} greedy tokens, rounded: {found}; {'ok' if near else 'NOT a near tie'}", flush=True)


def speed(session: Session, text: torch.Tensor) -> None:
    """Median seconds of a prefill of 64 tokens and of a decode step, weights being decoded."""
    long = text.repeat(-(-64 // len(text)))[:64]
    prefills, steps = [], []
    for _ in range(5):
        session.reset()
        prefills.append(timed(session, long))
    for token in long[:32]:
        steps.append(timed(session, token[None]))
    print(f"prefill of 64 tokens {median(prefills):.2f} s, decode step {median(steps):.3f} s", flush=True)


def timed(session: Session, tokens: torch.Tensor) -> float:
    started = time.perf_counter()
    session.feed(tokens)
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
