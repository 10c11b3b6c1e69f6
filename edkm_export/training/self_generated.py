"""Text that the original model writes itself, to distill it on (LLM-QAT, Liu et al. 2023, arXiv 2305.17888).

It covers what the model knows instead of what the training files happen to hold. Plain sampling at temperature 1
is the model's own distribution; half of the rows start from the end-of-text token and half from a few tokens of
the data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import activity
from edkm_export.errors import InputError
from edkm_export.reference.caching import new_cache, run_cached
from edkm_export.training.tokens import Tokens

__all__ = ["first_token", "generate"]

_PROMPT = 8  # tokens


def first_token(tokenizer: Any) -> int:
    """The token that a text starts with.

    Raises:
        InputError: the tokenizer has none.
    """
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise InputError("--self-generated: the tokenizer has neither a beginning- nor an end-of-text token.")
    return int(found)


@torch.no_grad()
def generate(
    model: Any,
    data: Tokens,
    *,
    tokens: int,
    context: int,
    start: int,
    rows: int | None = None,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Tokens:
    """Sample rows of `context` tokens.

    An end-of-text token does not end a row: the model goes on with another text, as in packed training data.

    Args:
        model: a float causal language model of transformers.
        data: where half of the beginnings are from.
        tokens: how many are wanted, rounded up to whole rows.
        context: length of a row.
        start: the token that the other rows start with.
        rows: rows that are sampled together; None: as many as the device is good for.
        seed: of the sampling.
        advance: called with the number of tokens whenever one was added to each row.

    Returns:
        The rows behind each other.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    batch = rows or (1024 if on_gpu else 16)
    generator = torch.Generator(device=device).manual_seed(seed)
    places = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    remaining = -(-tokens // context)
    length = min(_PROMPT, context)
    # Autocast would convert the weights again for every token.
    is_wide = on_gpu and model.dtype != torch.bfloat16
    narrow = _in_dtype(model, torch.bfloat16) if is_wide else contextlib.nullcontext()
    with narrow, activity("writing", remaining * context, "tokens") as writing:

        def add(count: int) -> None:
            writing.advance(count)
            if advance is not None:
                advance(count)

        while remaining > 0:
            count = min(batch, remaining)
            begin = torch.randint(max(1, len(data) - length), (count,), generator=places)
            prompts = torch.stack([data.ids[place : place + length] for place in begin.tolist()]).long()
            # A row that starts a text has one known token, the others sample theirs from the same position on.
            fresh = torch.arange(count) % 2 == 0
            made.append(
                _sample(model, prompts.to(device), fresh.to(device), context, start, generator, add).cpu()
            )
            remaining -= count
    return Tokens(torch.cat(made).reshape(-1).to(torch.int32))


def _sample(
    model: Any,
    prompts: Tensor,
    fresh: Tensor,
    context: int,
    start: int,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> Tensor:
    """Rows [count, context]; `fresh` ones [count] begin with `start` and ignore their prompt."""
    count, known = prompts.shape
    ids = torch.empty(count, context, dtype=torch.int64, device=prompts.device)
    ids[:, 0] = torch.where(fresh, start, prompts[:, 0])
    cache = new_cache(model)
    for place in range(1, context):
        logits = run_cached(model, ids[:, place - 1 : place], cache)
        drawn = torch.multinomial(logits[:, -1].float().softmax(-1), 1, generator=generator)[:, 0]
        ids[:, place] = torch.where(fresh, drawn, prompts[:, place]) if place < known else drawn
        advance(count)
    return ids


@contextlib.contextmanager
def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Hold the parameters in another dtype for a while."""
    kept = {parameter: parameter.data for parameter in model.parameters()}
    for parameter, data in kept.items():
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data
