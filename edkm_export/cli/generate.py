"""edkm-export generate: let a checkpoint or an exported model write."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from edkm_export.cli.parameter_types import ARTIFACT, memory_option

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from torch import Tensor

    from edkm_export.artifact.generation import Generation, Sampling
    from edkm_export.artifact.protocol import Session

__all__ = ["command"]

_ENDS = {
    "stop": "the model ended its text",
    "told": "a --stop text came",
    "length": "--max-new-tokens reached",
    "context": "its context is full: the model cannot go on",
}


@click.command("generate", short_help="Let a checkpoint or an exported model write text.")
@click.argument("path", metavar="OUT|MODEL.PT", type=ARTIFACT)
@click.option("--prompt", help="What to go on from; with --chat, what the user says first.")
@click.option(
    "--chat",
    is_flag=True,
    help="Hold a conversation in the model's chat template: each line of the terminal, or of standard input, is a "
    "turn, up to the end of it (Ctrl-D). With --prompt and no terminal there is one turn.",
)
@click.option(
    "--max-new-tokens",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Longest answer.",
)
@click.option(
    "--stop",
    "stops",
    metavar="TEXT",
    multiple=True,
    help="End before this text, which is not printed; may be given several times.",
)
@click.option("--temperature", type=float, help="Draw tokens at random; below 1 likely ones more often.")
@click.option("--top-p", type=float, help="Draw only from the likeliest tokens that reach this probability.")
@click.option("--seed", type=int, help="Of the drawing.  [default: 0]")
@memory_option
def command(
    path: Path,
    prompt: str | None,
    chat: bool,
    max_new_tokens: int,
    stops: tuple[str, ...],
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    memory_bytes: int | None,
) -> None:
    """Write on after a prompt, token by token through the model's cache.

    OUT is a folder that `edkm-export onnx`, `coreml` or `coreai` made, or a part of one. The text goes to standard
    output, figures go to standard error.

    Without --temperature the most likely token is taken each time, so that every format of one model writes the same
    text, but for one: the ONNX profile `fast` rounds activations to int8, and may part from the others. On
    SmolLM2-135M that changes 6% of the most likely tokens (median KL divergence 0.007 nats).
    """
    if prompt is None and not chat:
        raise click.UsageError("Missing option '--prompt'; or hold a conversation with --chat.")

    from edkm_export.artifact.conversation import Conversation
    from edkm_export.cli.console import err
    from edkm_export.errors import InputError
    from edkm_export.memory_budget import MemoryBudget
    from edkm_export.prompt import encode_prompt
    from edkm_export.stop_texts import StopTexts

    writer = _Writer(max_new_tokens, _sampling(temperature, top_p, seed), stops)
    StopTexts(stops)  # refuses what it cannot use
    with err.status(f"reading {path}"):
        opened = _open(path, MemoryBudget.of(memory_bytes).room_bytes())
    _warn_if_slow(opened.session, path)
    if not chat:
        assert prompt is not None
        writer.write(opened, encode_prompt(opened.tokenizer, prompt, chat=False, where=str(path)), 0)
        return
    conversation = Conversation(opened.session, opened.tokenizer, str(path))
    for number, said in enumerate(_turns(prompt)):
        before = conversation.forgotten
        try:
            tokens, cached = conversation.ask(said, max_new_tokens)
        except InputError as error:
            if number == 0 or not sys.stdin.isatty():
                raise
            err.print(f"{error} It was left out.")
            continue
        if dropped := conversation.forgotten - before:
            err.print(
                f"the context of {opened.session.context:,} positions is full: the first {dropped} of the turns so far "
                "are forgotten."
            )
        made, text = writer.write(opened, tokens, cached)
        conversation.answered(text, tokens.tolist() + made.read)


class _Opened(NamedTuple):
    session: Session
    tokenizer: Any
    stop: frozenset[int]


class _Writer(NamedTuple):
    """How answers are written."""

    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]

    def write(self, opened: _Opened, tokens: Tensor, cached: int) -> tuple[Generation, str]:
        """Print an answer, and figures about it; the answer is also returned."""
        from edkm_export.artifact.generation import generate
        from edkm_export.cli.answer_stream import AnswerStream
        from edkm_export.cli.console import err

        stream = AnswerStream(opened.tokenizer, tokens.tolist(), self.stops)
        with stream.shown():
            made = generate(
                opened.session,
                tokens,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                stop=opened.stop,
                on_token=stream.push,
                cached=cached,
            )
        err.print(_figures(made, opened.session.context, cached), soft_wrap=True)
        return made, stream.text.removesuffix("\n")


def _turns(first: str | None) -> Iterator[str]:
    """What the user says: `first`, and the lines of the terminal, or of standard input if there is no first."""
    if first is not None:
        yield first
    asks = sys.stdin.isatty()
    if first is not None and not asks:
        return
    while True:
        line = _ask() if asks else sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip("\n")


def _ask() -> str:
    """A line that the user types, with its end; empty at the end of the input."""
    from edkm_export.cli.terminal import Terminal

    display = Terminal.display
    if display is None:
        return _line()
    with display.suspended():
        return _line()


def _line() -> str:
    click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        click.echo(err=True)
    return line


def _sampling(temperature: float | None, top_p: float | None, seed: int | None) -> Sampling:
    from edkm_export.artifact.generation import GREEDY, Sampling

    if not temperature:
        if top_p is not None or seed is not None:
            name = "--seed" if top_p is None else "--top-p"
            raise click.UsageError(f"{name} is for drawing at random; add --temperature, such as 0.7.")
        return GREEDY
    return Sampling(temperature, 1.0 if top_p is None else top_p, seed or 0)


def _open(path: Path, room_bytes: int) -> _Opened:
    """A session for whatever lies at `path`; its decoded weights take so much memory, or are decoded at each use."""
    from edkm_export.api.artifacts import is_artifact, open_session

    if is_artifact(path):
        return _with_tokenizer(*open_session(path, room_bytes))
    return _checkpoint(path, room_bytes)


def _checkpoint(path: Path, room_bytes: int) -> _Opened:
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
    return _Opened(TorchSession.of(checkpoint, room_bytes), tokenizer, frozenset(end_tokens(*settings)))


def _with_tokenizer(session: Session, folder: Path) -> _Opened:
    from edkm_export.end_tokens import end_tokens
    from edkm_export.prompt import read_settings, read_tokenizer
    from edkm_export.regular_file import read_regular

    tokenizer = read_tokenizer(folder)
    files = [folder / name for name in ("generation_config.json", "config.json")]
    settings = [read_settings(read_regular(file), str(file)) for file in files if file.is_file()]
    settings.append({"eos_token_id": tokenizer.eos_token_id})
    return _Opened(session, tokenizer, frozenset(end_tokens(*settings)))


def _warn_if_slow(session: Session, path: Path) -> None:
    """Say so before a package without a cache writes its first token."""
    from edkm_export.cli.console import err
    from edkm_export.command_line import command_line

    if session.has_cache:
        return
    err.print(
        f"warning: {path} has no cache (interface logits), so each token runs all {session.context:,} positions "
        "again, which is slow. A package with a cache is made by"
    )
    err.print_command("   ", command_line("coreml", "MODEL.PT", "--interface", "swift-transformers"))


def _figures(made: Generation, context: int, cached: int) -> str:
    """Speed and the reason of the end, for standard error."""
    decoded = max(len(made.choices) - 1, 0) + (
        made.finish == "stop"
    )  # the first token comes from the prefill
    speed = f"{decoded / made.decode_s:.1f} tokens/s" if decoded and made.decode_s > 0 else "no decoding"
    read = made.prompt_tokens - cached
    prompt_speed = f", {read / made.prefill_s:.1f} tokens/s" if made.prefill_s > 0 else ""
    known = f" ({cached} more in the cache)" if cached else ""
    reason = _ENDS[made.finish] + (f" ({context:,} positions)" if made.finish == "context" else "")
    return (
        f"prompt: {read} tokens{known} in {made.prefill_s:.2f} s{prompt_speed}; "
        f"text: {len(made.choices)} tokens, {speed}; {reason}"
    )
