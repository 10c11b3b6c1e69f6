"""EleutherAI's lm-evaluation-harness on models of transformers and on exported artifacts.

Tasks may be local: a folder with YAML files whose data are JSONL files beside them, for machines without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edkm_export.artifact.generation import generate
from edkm_export.artifact.protocol import Session
from edkm_export.errors import BackendMissingError, InputError
from edkm_export.verify.multiple_choice import ExecuteBatch, Likelihood, encode_pair, log_likelihoods

__all__ = ["harness_model", "run_tasks"]


def run_tasks(
    model: Any, tasks: Sequence[str], *, folder: str | Path | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate a model on tasks of the harness.

    Args:
        model: of `harness_model`.
        tasks: names of tasks.
        folder: further tasks, as YAML files.
        limit: use only so many documents of each.

    Returns:
        Measures by task, such as {"arc_easy": {"acc": 0.5, "acc_stderr": 0.01}}.

    Raises:
        InputError: a task is not known, or its files cannot be read.
        BackendMissingError: the harness is not installed.
    """
    harness = _harness()
    try:
        manager = harness.tasks.TaskManager(include_path=None if folder is None else str(folder))
        found = harness.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0
        )
    except (KeyError, OSError, ValueError) as error:
        raise InputError(f"{', '.join(tasks)}: the harness cannot run this: {error}") from error
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in measures.items()
            if isinstance(value, (int, float))
        }
        for task, measures in found["results"].items()
    }


def harness_model(
    run: ExecuteBatch | nn.Module, tokenizer: Any, *, context: int, session: Session | None = None
) -> Any:
    """Wrap anything that gives logits as a model of the harness.

    Args:
        run: a model of transformers, or what `batched` or `one_by_one` of `multiple_choice` gives.
        tokenizer: a tokenizer of transformers.
        context: most tokens of one text; longer ones lose their beginning.
        session: the same model with a cache, for tasks that generate; None: those are refused.

    Raises:
        BackendMissingError: the harness is not installed.
    """
    base = _harness().api.model.LM

    class Model(base):  # type: ignore[misc, valid-type]  # its base is only known where the harness is installed
        """The adapter."""

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            pairs = [encode_pair(tokenizer, *request.args) for request in requests]
            return [(score.nats, score.greedy) for score in log_likelihoods(run, pairs, context=context)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [_rolling(run, tokenizer, request.args[0], context) for request in requests]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            if session is None:
                raise InputError("this task generates text, for which the model must have a cache.")
            return [_generate(session, tokenizer, *request.args) for request in requests]

    return Model()


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise BackendMissingError(
            "the lm-evaluation-harness is not installed; pip install 'edkm-export[eval]'"
        ) from error
    return lm_eval


def _rolling(run: ExecuteBatch | nn.Module, tokenizer: Any, text: str, context: int) -> float:
    """Log likelihood of a whole text, in windows that do not overlap, the first after the token that starts a text."""
    start, tokens = encode_pair(tokenizer, "", text)
    pairs = [
        (tokens[place - 1 : place] if place else start, tokens[place : place + context])
        for place in range(0, len(tokens), context)
    ]
    scores: list[Likelihood] = log_likelihoods(run, pairs, context=context)
    return sum(score.nats for score in scores)


def _generate(session: Session, tokenizer: Any, prompt: str, settings: dict[str, Any]) -> str:
    """Greedy continuation up to one of the strings in `until`."""
    count = int(settings.get("max_gen_toks", 256))
    tokens = torch.tensor(tokenizer(prompt)["input_ids"])[-max(1, session.context - count) :]
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made = generate(session, tokens, max_new_tokens=count, stop=stop)
    text = str(tokenizer.decode(made.tokens, skip_special_tokens=True))
    until = settings.get("until", [])
    for end in [until] if isinstance(until, str) else until:
        if end:
            text = text.split(end)[0]
    return text
