"""A limit of the time: fewer tokens, and everything that was cut is said. The clock is made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edkm_export.artifact.execution import Execution
from edkm_export.artifact.thresholds import EXECUTION
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source
from edkm_export.reference.torch_session import TorchSession
from edkm_export.verify import compare_models, ladder
from edkm_export.verify.compare_models import Contestant, compare, comparison_page
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.report import Report, Verdict
from edkm_export.verify.time_budget import DECODED, WINDOW, Budget, Share, run_windows
from edkm_export.verify.torch_runs import transformers_model
from edkm_export.verify.write import markdown

TOKENS = 4 * 64  # the fixture holds 128 positions, and these windows 64


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, execute: Any) -> Any:
        def run(tokens: torch.Tensor) -> torch.Tensor:
            self.now += seconds
            return execute(tokens)

        return run


# Sharing out


def test_without_a_limit_everything_is_run():
    budget = Budget(None)
    assert list(budget.share().within(range(5))) == [0, 1, 2, 3, 4]
    assert not budget.is_over and budget.spent == ""


def test_stages_share_evenly_and_pass_on_what_they_leave():
    clock = Clock()
    budget = Budget(1, clock)
    budget.expect(3)
    first = budget.share()  # 20 of 60 seconds
    done = []
    for item in first.within(range(100)):
        clock.now += 6
        done.append(item)
    assert done == [0, 1, 2]  # a fourth would end at 24
    second = budget.share()  # half of the 42 that are left
    clock.now += 1
    assert len([clock.taking(1, lambda x: x)(item) for item in second.within(range(3))]) == 3
    assert list(budget.share().within([7])) == [7] and not budget.is_over


def test_the_first_item_is_run_in_any_case():
    clock = Clock()
    budget = Budget(1, clock)
    clock.now = 100.0
    assert budget.is_over and "--minutes 1" in budget.spent
    share = budget.share()
    seen = []
    for item in share.within(range(3)):
        clock.now += 1
        seen.append(item)
    assert seen == [0]


def test_windows_are_run_while_there_is_time():
    clock = Clock()
    windows = torch.arange(12).view(4, 3)
    assert len(run_windows(clock.taking(10, lambda x: x), windows, Share(35.0, clock))) == 3
    assert len(run_windows(clock.taking(10, lambda x: x), windows, Share(None, clock))) == 4


# The ladder


class Stub:
    """The checkpoint itself as an artifact that takes a while."""

    kind = "stub"
    context = 64

    def __init__(self, checkpoint: Any, clock: Clock, seconds: float, folder: Any) -> None:
        self._checkpoint, self._model, self.path = checkpoint, load_hard_model(checkpoint), folder
        run = clock.taking(seconds, transformers_model(self._model))
        threshold = EXECUTION["float32"]
        self.executions = (
            Execution("execution-one", "runtime one", threshold, run),
            Execution("execution-two", "runtime two", threshold, run),
        )

    def palettized(self) -> Any:
        return self._checkpoint.palettized

    def dense(self) -> Any:
        return self._checkpoint.dense

    def weights_size_bytes(self) -> int:
        return 1000

    def size_bytes(self) -> int:
        return 1000

    def session(self) -> Any:
        return TorchSession(self._model)

    def rounded_session(self) -> None:
        return None


@pytest.fixture
def climb(tiny_checkpoint, tiny_llama, held_out, tmp_path, monkeypatch):
    def run(seconds: float, minutes: float | None) -> Report:
        clock = Clock()
        monkeypatch.setattr(ladder, "Budget", lambda minutes: Budget(minutes, clock))
        evaluation = VerificationInputs(
            held_out,
            "words",
            tokens=TOKENS,
            original=Source.parse(str(tiny_llama)),
            minutes=minutes,
            continuation=4,
        )
        artifact = Stub(tiny_checkpoint, clock, seconds, tmp_path)
        return verify_artifact(tiny_checkpoint, artifact, evaluation, predicted_size_bytes=1000)

    return run


def tokens_of(report: Report) -> dict[str, Any]:
    return {rung.id: rung.measures.get("tokens") for rung in report.rungs}


def test_nothing_is_cut_when_there_is_time(climb):
    report = climb(seconds=0.1, minutes=60)
    assert report.time_budget.cut == [] and report.faithful_export is Verdict.PASS
    assert tokens_of(report)["execution-one"] == TOKENS
    assert "nothing was left out" in markdown(report)
    assert climb(seconds=0.1, minutes=None).time_budget is None


def test_fewer_tokens_are_compared_and_it_is_said(climb):
    # 6 stages share 60 seconds: models of transformers take none, so the executions have 15 and more each
    report = climb(seconds=6, minutes=1)
    found = tokens_of(report)
    assert found["palettization"] == TOKENS and 64 <= found["execution-one"] < TOKENS
    assert report.faithful_export is Verdict.PASS
    assert [each.partition(":")[0] for each in report.not_run] == [
        "trained soft model",
        "positions that the artifact says it holds",  # this one says nothing
    ]
    cut = f"runtime one: {found['execution-one']} of {TOKENS} tokens compared"
    assert cut in report.time_budget.cut
    for text in (markdown(report), report.html()):
        assert cut in text
    assert (
        f"over {found['execution-one']} tokens"
        in next(r for r in report.rungs if r.id == "execution-one").detail
    )
    assert report.perplexities["runtime one"].tokens < report.perplexities["hard PyTorch"].tokens


def test_what_is_not_reached_is_not_run(climb):
    report = climb(seconds=100, minutes=1)  # the first window of the first execution uses it up
    rungs = {rung.id: rung for rung in report.rungs}
    assert rungs["execution-one"].measures["tokens"] == 64
    for name in ("execution-two", "prefill-decode", "continuation"):
        assert rungs[name].verdict is Verdict.NOT_RUN and "--minutes 1" in rungs[name].detail
        assert f"{rungs[name].candidate}: not run" in report.time_budget.cut
    assert report.faithful_export is Verdict.PASS  # one execution passed
    assert sum("--minutes 1" in line for line in report.not_run) == 3


def test_windows_are_short_where_the_time_is_limited(tiny_checkpoint, held_out):
    from edkm_export.reference.hard_model import load_hard_tokenizer
    from edkm_export.verify.inputs import evaluation_windows

    tokenizer = load_hard_tokenizer(tiny_checkpoint)
    for minutes, longest in ((None, 512), (5, WINDOW)):
        evaluation = VerificationInputs(held_out, "words", tokens=1024, minutes=minutes)
        assert evaluation_windows(tiny_checkpoint, evaluation, tokenizer, 2048).shape[1] == longest
    assert DECODED < WINDOW


# Models side by side


def test_comparison_is_on_the_tokens_of_the_slowest(tiny_checkpoint, tiny_llama, held_out, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compare_models, "Budget", lambda minutes: Budget(minutes, clock))
    fast = Contestant.of_checkpoint(tiny_checkpoint, "fast", 1)

    def slow_model() -> Any:
        return clock.taking(10, fast.load())

    slow = Contestant("slow", "stub", 4.0, 1, 64, fast.tokenizer, slow_model)
    settings: dict[str, Any] = {"tokens": TOKENS, "original": Source.parse(str(tiny_llama))}
    found = compare([fast, slow], held_out, "/home/me/words.txt", minutes=0.5, **settings)
    assert (found.tokens, found.asked) == (3 * 64, TOKENS)
    assert [row.perplexity.tokens for row in found.rows] == [3 * 63] * 3
    assert found.rows[1].distance.tokens == found.rows[2].distance.tokens == 3 * 64
    assert found.rows[1].perplexity == found.rows[2].perplexity
    assert "slow had no time for more in 0.5 minutes" in found.cut
    page = comparison_page(found)
    assert found.cut in page and "192 of 256 tokens of words.txt" in page and "/home" not in page
    # the same tokens without a limit give the same figures
    whole = compare([fast, slow], held_out, "words", tokens=3 * 64, original=settings["original"])
    assert whole.cut == "" and whole.rows == found.rows
