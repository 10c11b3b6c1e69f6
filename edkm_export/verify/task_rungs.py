"""Tasks as rungs of the ladder, and as a table of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edkm_export.artifact.execution import AT_FAULT
from edkm_export.artifact.protocol import Artifact, kv_cache_of
from edkm_export.artifact.thresholds import CONTINUATION_WHY
from edkm_export.kv_cache import FLOAT
from edkm_export.verify.continuation import tie_limit
from edkm_export.verify.report import Rung, TaskAnswers, TaskResult, Verdict
from edkm_export.verify.task_runs import Answer, Question, answers_of, artifact_answers
from edkm_export.verify.time_budget import Budget
from edkm_export.verify.words import counts_words

__all__ = ["answers_rung", "climb_tasks", "task_results", "tasks_rung"]

_ALIKE = "the same answers; the first token, or choice, that differs must be a near tie"
_SHOWN = 8  # items of a task whose answers the report holds


def climb_tasks(
    artifact: Artifact,
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    long: dict[str, int],
    original: Sequence[Answer] | None,
    missing: str,
    most: float | None,
    budget: Budget,
) -> tuple[list[TaskResult], list[Rung]]:
    """Let hard PyTorch and the artifact answer, the latter in the arithmetic of its first execution.

    Args:
        artifact: what can be run.
        model: hard PyTorch.
        tokenizer: to put tokens into words.
        questions: items that fit.
        long: by task, how many do not.
        original: answers of the original; None: it was not run, for the reason `missing`.
        missing: see there.
        most: see `tasks_rung`.
        budget: of the time.

    Returns:
        Right answers by task, and both rungs.
    """
    first = artifact.executions[0]
    if not questions or budget.is_over:
        why = budget.spent if questions else "no item fits into the context of the artifact"
        return [], [tasks_rung(None, why, most), answers_rung(None, why, first.words)]
    hard = answers_of(model, questions, tokenizer, budget.share())
    found: tuple[list[Answer], list[str]] | str | None = None
    if first.execute is not None and not budget.is_over:
        try:
            found = artifact_answers(
                first.execute,
                artifact.session(),
                artifact.context,
                hard,
                questions,
                tokenizer,
                tie_limit(artifact),
                budget.share(),
            )
        except AT_FAULT as error:
            found = str(error)
    reached = found[0] if isinstance(found, tuple) else None
    results = task_results(questions, long, original, hard, reached)
    return results, [
        tasks_rung(results, missing, most),
        answers_rung(found, first.missing or budget.spent, first.words, alike=kv_cache_of(artifact) == FLOAT),
    ]


def task_results(
    questions: Sequence[Question],
    long: dict[str, int],
    original: Sequence[Answer] | None,
    hard: Sequence[Answer],
    artifact: Sequence[Answer] | None,
) -> list[TaskResult]:
    """Right answers by task, of the items that all models came to.

    Args:
        questions: all that fit.
        long: by task, how many are too long.
        original: answers to the first of them; None: not run.
        hard: those of hard PyTorch.
        artifact: likewise; None: not run.
    """
    reached = min(len(answers) for answers in (original, hard, artifact) if answers is not None)
    names = list(dict.fromkeys([question.task for question in questions] + list(long)))
    found = []
    for name in names:
        places = [place for place, question in enumerate(questions[:reached]) if question.task == name]
        given = sum(question.task == name for question in questions) + long.get(name, 0)
        telling = [place for place in places if _tells(place, original, hard, artifact)]
        found.append(
            TaskResult(
                task=name,
                items=len(places),
                left_out=given - len(places),
                original=_count(original, places),
                palettized=_count(hard, places) or 0,
                artifact=_count(artifact, places),
                answers=[
                    TaskAnswers(
                        item=questions[place].number,
                        asked=questions[place].shown[-300:],
                        original=None if original is None else original[place].text,
                        palettized=hard[place].text,
                        artifact=None if artifact is None else artifact[place].text,
                        right=[
                            name
                            for name, answers in (
                                ("original", original),
                                ("palettized", hard),
                                ("artifact", artifact),
                            )
                            if answers is not None and answers[place].right
                        ],
                    )
                    for place in telling[:_SHOWN]
                ],
            )
        )
    return found


def _count(answers: Sequence[Answer] | None, places: Sequence[int]) -> int | None:
    return None if answers is None else sum(answers[place].right for place in places)


def _tells(
    place: int, original: Sequence[Answer] | None, hard: Sequence[Answer], artifact: Sequence[Answer] | None
) -> bool:
    """Whether models answered an item differently, or it was got wrong."""
    others = [answers[place] for answers in (original, artifact) if answers is not None]
    return any(other.right != hard[place].right for other in others) or (
        artifact is not None and artifact[place].text != hard[place].text
    )


def tasks_rung(found: Sequence[TaskResult] | None, missing: str, most: float | None) -> Rung:
    """Right answers of hard PyTorch against those of the original.

    Args:
        found: None: not run, for the reason `missing`.
        missing: why the original, or everything, was not run.
        most: share of a task's items that palettization may lose, gains counted against losses; None: no limit.
    """
    names: dict[str, Any] = {
        "id": "tasks",
        "reference": "original",
        "candidate": "right answers to tasks: hard PyTorch",
        "threshold": "none"
        if most is None
        else f"of no task more than {most:.0%} of the items fewer than the original",
        "why": "how far palettization moved a model shows in what it still does, not in perplexity alone"
        if most is not None
        else "no limit was set (--max-task-loss)",
    }
    if found is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=missing)
    detail = "; ".join(f"{one.task}: {counts_words(one)}" for one in found)
    known = [one for one in found if one.original is not None and one.items]
    measures = {
        "tasks": {
            one.task: {"items": one.items, "original": one.original, "palettized": one.palettized}
            for one in found
        },
        "most_lost": most,
    }
    if not known:
        return Rung(
            **names,
            verdict=Verdict.NOT_RUN,
            detail=f"no original to compare with: {missing}; {detail}",
            measures=measures,
        )
    if most is None:
        return Rung(**names, verdict=Verdict.REPORTED, detail=detail, measures=measures)
    beyond = [one.task for one in known if (one.original or 0) - one.palettized > most * one.items]
    return Rung(
        **names,
        verdict=Verdict.BEYOND if beyond else Verdict.WITHIN,
        detail=f"{detail}; beyond the limit: {', '.join(beyond)}" if beyond else detail,
        measures=measures,
    )


def answers_rung(
    found: tuple[Sequence[Answer], Sequence[str]] | str | None,
    missing: str,
    executor: str,
    *,
    alike: bool = True,
) -> Rung:
    """Answers of the artifact against those of hard PyTorch.

    Args:
        found: answers, and where they differ without a near tie; or the fault in words; None: for the reason `missing`.
        missing: why it was not run.
        executor: what ran, in words.
        alike: it should answer as hard PyTorch; with keys and values of int8 it need not, and is only counted.
    """
    names: dict[str, Any] = {
        "id": "tasks-artifact",
        "reference": "hard PyTorch",
        "candidate": f"answers to tasks: {executor}",
        "threshold": _ALIKE if alike else "none",
        "why": CONTINUATION_WHY
        if alike
        else "the artifact rounds keys and values to int8, hard PyTorch does not",
    }
    if found is None:
        return Rung(**names, verdict=Verdict.NOT_RUN, detail=missing)
    if isinstance(found, str):
        return Rung(**names, verdict=Verdict.FAIL, detail=found)
    answers, faults = found
    same = len(answers) - len(faults)
    detail = f"{same} of {len(answers)} items answered as hard PyTorch does, near ties aside"
    return Rung(
        **names,
        verdict=(Verdict.FAIL if faults else Verdict.PASS) if alike else Verdict.REPORTED,
        detail="; ".join([detail, *faults[:_SHOWN]]),
        measures={"items": len(answers), "as_hard_pytorch": same},
    )
