"""edkm-export generate: let a checkpoint or an exported model write."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.artifact.generation import Generation, Sampling
    from edkm_export.artifact.protocol import Session

__all__ = ["command"]

_ENDS = {
    "stop": "the model ended its text",
    "length": "--max-new-tokens reached",
    "context": "its context is full: the model cannot go on",
}


@click.command("generate", short_help="Let a checkpoint or an exported model write text.")
@click.argument("path", metavar="OUT|MODEL.PT", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to go on from; with --chat, what the user says.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer."
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--temperature", type=float, help="Draw tokens at random; below 1 likely ones more often.")
@click.option("--top-p", type=float, help="Draw only from the likeliest tokens that reach this probability.")
@click.option("--seed", type=int, help="Of the drawing.  [default: 0]")
def command(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    """Write on after a prompt, token by token through the model's cache.

    OUT is a folder that `edkm-export onnx`, `coreml` or `coreai` made, or a part of one. Without --temperature
    the most likely token is taken each time, so that every format of one model writes the same text. The text goes to
    standard output, figures go to standard error.
    """
    from edkm_export.artifact.generation import generate
    from edkm_export.cli.console import err
    from edkm_export.detokenize import TextStream
    from edkm_export.prompt import encode_prompt

    sampling = _sampling(temperature, top_p, seed)
    with err.status(f"reading {path}"):
        opened = _open(path)
        tokens = encode_prompt(opened.tokenizer, prompt, chat=chat, where=str(path))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without Unicode shows question marks
        sys.stdout.reconfigure(errors="replace")
    stream = TextStream(opened.tokenizer, tokens.tolist())
    try:
        made = generate(
            opened.session,
            tokens,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=opened.stop,
            on_token=lambda token: click.echo(stream.push(token), nl=False),
        )
    except KeyboardInterrupt:
        click.echo()  # the message begins on a line of its own
        raise
    click.echo(stream.finish())
    err.print(_figures(made, opened.session.context), soft_wrap=True)


class _Opened(NamedTuple):
    session: Session
    tokenizer: Any
    stop: frozenset[int]


def _sampling(temperature: float | None, top_p: float | None, seed: int | None) -> Sampling:
    from edkm_export.artifact.generation import GREEDY, Sampling

    if not temperature:
        if top_p is not None or seed is not None:
            name = "--seed" if top_p is None else "--top-p"
            raise click.UsageError(f"{name} is for drawing at random; add --temperature, such as 0.7.")
        return GREEDY
    return Sampling(temperature, 1.0 if top_p is None else top_p, seed or 0)


def _open(path: Path) -> _Opened:
    """A session for whatever lies at `path`."""
    from edkm_export.cli.artifacts import is_artifact, open_session
    from edkm_export.errors import InputError

    if not path.exists():
        raise InputError(f"{path}: no such file or folder.")
    return _with_tokenizer(*open_session(path)) if is_artifact(path) else _checkpoint(path)


def _checkpoint(path: Path) -> _Opened:
    from edkm_export.checkpoint import load
    from edkm_export.end_tokens import end_tokens
    from edkm_export.prompt import read_settings
    from edkm_export.reference.hard_model import load_hard_tokenizer
    from edkm_export.reference.torch_session import TorchSession

    checkpoint = load(path)
    tokenizer = load_hard_tokenizer(checkpoint)
    settings, name = [{"eos_token_id": tokenizer.eos_token_id}, checkpoint.config], "generation_config.json"
    if name in checkpoint.tokenizer:
        settings.append(read_settings(checkpoint.tokenizer[name], f"{path}: {name}"))
    return _Opened(TorchSession.of(checkpoint), tokenizer, frozenset(end_tokens(*settings)))


def _with_tokenizer(session: Session, folder: Path) -> _Opened:
    from edkm_export.end_tokens import end_tokens
    from edkm_export.prompt import read_settings, read_tokenizer

    tokenizer = read_tokenizer(folder)
    files = [folder / name for name in ("generation_config.json", "config.json")]
    settings = [read_settings(file.read_bytes(), str(file)) for file in files if file.is_file()]
    settings.append({"eos_token_id": tokenizer.eos_token_id})
    return _Opened(session, tokenizer, frozenset(end_tokens(*settings)))


def _figures(made: Generation, context: int) -> str:
    """Speed and the reason of the end, for standard error."""
    decoded = max(len(made.choices) - 1, 0) + (
        made.finish == "stop"
    )  # the first token comes from the prefill
    speed = f"{decoded / made.decode_s:.1f} tokens/s" if decoded and made.decode_s > 0 else "no decoding"
    prompt_speed = f", {made.prompt_tokens / made.prefill_s:.1f} tokens/s" if made.prefill_s > 0 else ""
    reason = _ENDS[made.finish] + (f" ({context:,} positions)" if made.finish == "context" else "")
    return (
        f"prompt: {made.prompt_tokens} tokens in {made.prefill_s:.2f} s{prompt_speed}; "
        f"text: {len(made.choices)} tokens, {speed}; {reason}"
    )
