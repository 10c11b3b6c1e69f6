"""Greedy continuations and prefill against decode, on sessions whose answers are written down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edkm_export.artifact.execution import Execution
from edkm_export.artifact.thresholds import DECODE_KL, EXECUTION
from edkm_export.errors import PackageError
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.reference.torch_session import TorchSession
from edkm_export.verify.continuation import compare_continuations, prefill_against_decode, side_by_side
from edkm_export.verify.quoting import quoted
from edkm_export.verify.report import Verdict
from edkm_export.verify.rungs import continuation_rung, decode_rung
from edkm_export.verify.torch_runs import transformers_model


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_hard_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_hard_tokenizer(tiny_checkpoint)


@pytest.fixture
def prompts(tokenizer):
    return {"A hacker is": torch.tensor(tokenizer("A hacker is")["input_ids"])}


class Altered:
    """A session whose logits are changed at one position of the text."""

    def __init__(self, model, place: int, change) -> None:
        self._session, self._place, self._change, self._used = TorchSession(model), place, change, 0
        self.context = self._session.context

    def reset(self) -> None:
        self._session.reset()
        self._used = 0

    def feed(self, tokens):
        logits = self._session.feed(tokens)
        row = self._place - self._used
        if 0 <= row < len(tokens):
            logits[row] = self._change(logits[row].clone())
        self._used += len(tokens)
        return logits


def artifact(execute=None):
    execution = Execution("execution-float32", "float32", EXECUTION["float32"], execute)
    return SimpleNamespace(path=Path("x"), context=64, executions=[execution])


def raise_second(margin: float):
    """Put the second most likely token in front of the first by a margin, in nats."""

    def change(row):
        first, second = row.topk(2).indices
        row[second] = row[first] + margin
        return row

    return change


def level(row):
    """Bring the second most likely token within half a percent of the first."""
    first, second = row.topk(2).indices
    row[second] = row[first] - 5e-3
    return row


def test_the_same_model_continues_alike(model, tokenizer, prompts):
    for session, execute in ((TorchSession(model), None), (None, transformers_model(model))):
        (found,) = compare_continuations(artifact(execute), session, model, tokenizer, prompts, 10)
        assert found.difference is None and found.equal == found.wanted == 10 and str(found) == ""
        assert continuation_rung([found], "").verdict is Verdict.PASS


@pytest.mark.parametrize("after", [0, 3])
def test_another_token_fails_and_is_shown(model, tokenizer, prompts, after):
    (ids,) = prompts.values()
    altered = Altered(model, len(ids) - 1 + after, raise_second(1.0))
    (found,) = compare_continuations(artifact(), altered, model, tokenizer, prompts, 10)
    assert found.equal == after and not found.ok
    rung = continuation_rung([found], "")
    assert rung.verdict is Verdict.FAIL and f"token {after + 1} is {quoted(found.found)}" in rung.detail
    first, second = found.difference.reference.probabilities
    assert f"{first:.4f} and {second:.4f}" in rung.detail


def test_difference_at_a_near_tie_passes_and_is_shown(model, tokenizer, prompts, monkeypatch):
    """Hard PyTorch holds both tokens equally likely; the artifact takes the other one."""
    from edkm_export.verify import continuation

    (ids,) = prompts.values()
    monkeypatch.setattr(continuation, "TorchSession", lambda hard, **more: Altered(hard, len(ids) + 1, level))
    altered = Altered(model, len(ids) + 1, raise_second(1e-3))
    (found,) = compare_continuations(artifact(), altered, model, tokenizer, prompts, 10)
    assert found.equal == 2 and found.difference.near_tie
    rung = continuation_rung([found], "")
    assert rung.verdict is Verdict.PASS and "a near tie" in rung.detail and "0 of 1" in rung.detail
    assert rung.measures["continuations"][0]["parted"]["near_tie"] is True


@pytest.mark.parametrize("with_cache", [True, False])
def test_logits_that_are_not_finite_are_the_artifacts_fault(model, tokenizer, prompts, with_cache):
    (ids,) = prompts.values()
    broken = Altered(model, len(ids) - 1, lambda row: row * torch.nan)

    def execute(tokens):
        broken.reset()
        return broken.feed(tokens)

    with pytest.raises(PackageError, match="not finite"):
        compare_continuations(artifact(execute), broken if with_cache else None, model, tokenizer, prompts, 4)


def test_continuation_ends_with_the_context(model, tokenizer):
    ids = torch.arange(5, 65 - 3)
    (found,) = compare_continuations(
        artifact(transformers_model(model)), None, model, tokenizer, {"long": ids}, 10
    )
    assert found.wanted == 64 - len(ids) == 7


def test_prefill_agrees_with_decode(model):
    tokens = torch.arange(20, 60)
    found = prefill_against_decode(TorchSession(model), tokens)
    assert found.tokens == 32 and found.kl_max <= DECODE_KL
    assert decode_rung(found, "").verdict is Verdict.PASS


def test_decode_that_differs_at_one_position_fails(model):
    """The change only shows when tokens come one by one."""
    session = Altered(model, 7, raise_second(1.0))
    plain = session.feed

    def feed(tokens):
        return plain(tokens) if len(tokens) == 1 else session._session.feed(tokens)

    session.feed = feed
    found = prefill_against_decode(session, torch.arange(20, 60))
    assert found.kl_max > DECODE_KL >= found.kl_median
    assert decode_rung(found, "").verdict is Verdict.FAIL


def test_texts_of_the_original_and_the_palettized_model(model, tokenizer, prompts):
    (prompt,) = prompts
    continued = compare_continuations(artifact(), TorchSession(model), model, tokenizer, prompts, 4)
    ours = continued[0].tokens
    other = [*ours[:2], (ours[2] + 1) % 1024, ours[3], 7]  # longer, and another one from the third token on
    (found,) = side_by_side(continued, {prompt: other}, tokenizer)
    assert (found.prompt, found.tokens, found.shared_tokens) == (prompt, 4, 2)
    assert found.original == tokenizer.decode(other[:4]) and found.palettized == tokenizer.decode(ours)
    (alone,) = side_by_side(continued, {}, tokenizer)
    assert alone.original is None and alone.shared_tokens is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", '" the"'),
        ("a\n\t\r", r'"a\n\t\r"'),
        ('say "\\"', r'"say \"\\\""'),
        ("\u00a0\u200b", r'"\u00a0\u200b"'),
        ("é‘世", '"é‘世"'),
        ("", '""'),
    ],
)
def test_what_cannot_be_seen_is_quoted(text, expected):
    assert quoted(text) == expected
