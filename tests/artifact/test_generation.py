from __future__ import annotations

import math

import pytest
import torch

from edkm_export.artifact.generation import Choice, Sampling, first_difference, generate
from edkm_export.errors import InputError
from edkm_export.reference.torch_session import TorchSession
from tests.helpers.odd_models import build


class Script:
    """A session that knows its answers: logits of the token that follows `place` positions."""

    def __init__(self, logits, context=8):
        self.logits, self.context, self.fed = logits, context, []

    def reset(self):
        self.fed = []

    def feed(self, tokens):
        rows = []
        for token in tokens.tolist():
            self.fed.append(token)
            rows.append(self.logits(len(self.fed)))
        return torch.stack(rows)


def counting(place: int, vocab: int = 12) -> torch.Tensor:
    """Token `place` is the most likely one after `place` positions."""
    return torch.nn.functional.one_hot(torch.tensor(place % vocab), vocab).float() * 5


@pytest.fixture(scope="module")
def model():
    return build("plain").eval()


def prompt(count: int = 5, vocab: int = 320) -> torch.Tensor:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(1))


def test_greedy_equals_transformers(model):
    """transformers' own generate is the oracle; random logits have no near ties here, so every token must agree."""
    tokens = prompt()
    expected = model.generate(
        tokens[None], max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(tokens) :]
    made = generate(TorchSession(model), tokens, max_new_tokens=40)
    assert made.near_ties == []
    assert made.tokens == expected.tolist()
    assert (made.finish, made.prompt_tokens) == ("length", 5)


@pytest.mark.parametrize("split", [1, 2, 7, 20])
def test_torch_session_in_parts_equals_whole(model, split):
    tokens = prompt(20)
    session = TorchSession(model)
    parts = torch.cat([session.feed(part) for part in tokens.split(split)])
    whole = model(input_ids=tokens[None], use_cache=False).logits[0]
    # the same sums in another order: float32 has 7 digits, logits here are below 10
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert parts.dtype == torch.float32


def test_sliding_window_in_parts_equals_whole():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=6,
            attn_implementation="eager",
        )
    ).eval()
    tokens = prompt(30, 64)
    session = TorchSession(model)
    parts = torch.cat([session.feed(part) for part in tokens.split([11, 1, 1, 8, 1, 8])])
    with torch.no_grad():
        whole = model(input_ids=tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_reset_forgets(model):
    session = TorchSession(model)
    first = session.feed(prompt(4))
    session.feed(prompt(3))
    session.reset()
    assert torch.equal(session.feed(prompt(4)), first)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "there are no ids"),
        (torch.zeros(3), "torch.float32 [3]"),
        (torch.zeros(2, 3, dtype=torch.int64), "[2, 3]"),
        (torch.tensor([0, 320]), "token 320 is outside its vocabulary of 320"),
        (torch.tensor([-1, 5]), "token -1 is outside"),
        (torch.zeros(129, dtype=torch.int64), "holds 128 positions; 0 are taken, 129 more do not fit"),
    ],
)
def test_torch_session_refuses(model, tokens, message):
    with pytest.raises(InputError) as caught:
        TorchSession(model).feed(tokens)
    assert message in str(caught.value)


def test_context_is_counted_over_calls(model):
    session = TorchSession(model)
    session.feed(prompt(127))
    session.feed(prompt(1))
    with pytest.raises(InputError, match="128 are taken, 1 more do not fit"):
        session.feed(prompt(1))


def test_stops_at_a_stop_token_and_says_so():
    shown = []
    made = generate(
        Script(counting), torch.tensor([7, 7]), max_new_tokens=50, stop={5}, on_token=shown.append
    )
    assert made.tokens == shown == [2, 3, 4] and made.finish == "stop"


def test_fills_the_context_and_says_so():
    """The last token that fits is not fed any more: with 8 positions and a prompt of 2, tokens 3 to 9 are chosen."""
    session = Script(counting)
    made = generate(session, torch.tensor([7, 7]), max_new_tokens=50)
    assert made.tokens == [2, 3, 4, 5, 6, 7, 8] and made.finish == "context"
    assert session.fed == [7, 7, 2, 3, 4, 5, 6, 7]


def test_prompt_as_long_as_the_context_gives_one_token():
    made = generate(Script(counting), torch.zeros(8, dtype=torch.int64), max_new_tokens=5)
    assert made.tokens == [8] and made.finish == "context"


def test_long_prompt_is_fed_in_parts():
    session = Script(counting, context=1000)
    made = generate(session, torch.arange(700) % 12, max_new_tokens=1)
    assert session.fed == (torch.arange(700) % 12).tolist() and made.tokens == [700 % 12]


@pytest.mark.parametrize(
    ("tokens", "new", "message"),
    [
        ([], 1, "the prompt: there are no ids"),
        ([0] * 9, 1, "the prompt has 9 tokens, but the context holds 8; shorten it"),
        ([0], 0, "0 new tokens were asked for"),
    ],
)
def test_generate_refuses(tokens, new, message):
    with pytest.raises(InputError, match=message):
        generate(Script(counting), torch.tensor(tokens, dtype=torch.int64), max_new_tokens=new)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_generate_refuses_logits_that_are_not_finite(bad):
    def logits(place: int) -> torch.Tensor:
        row = counting(place)
        row[3] = bad
        return row

    with pytest.raises(InputError, match="not finite"):
        generate(Script(logits), torch.tensor([1]), max_new_tokens=2)


def test_near_ties_are_recorded():
    def logits(place: int) -> torch.Tensor:
        row = torch.full((12,), -20.0)
        row[3], row[5] = 1.0, 1.0 - (0.009 if place == 2 else 0.011)
        return row

    made = generate(Script(logits), torch.tensor([1]), max_new_tokens=4)
    assert made.tokens == [3, 3, 3, 3]
    assert made.near_ties == [1]  # the token that follows 2 positions
    tie = made.choices[1]
    assert tie.best == (3, 5) and tie.gap_nats == pytest.approx(0.009, abs=1e-6)
    assert sum(tie.probabilities) == pytest.approx(1, abs=1e-6)


def choice(token: int, best: tuple[int, int] = (1, 2), gap: float = 0.005) -> Choice:
    return Choice(token, best, (0.5, 0.5), gap)


def test_first_difference():
    same = [choice(1), choice(2)]
    assert first_difference(same, same) is None
    parted = first_difference([choice(1), choice(1)], [choice(1), choice(2)])
    assert parted is not None and parted.place == 1 and parted.near_tie
    wide = first_difference([choice(1, gap=0.02)], [choice(2)])
    assert wide is not None and not wide.near_tie
    third = first_difference([choice(1)], [choice(3)])  # none of the two that tie
    assert third is not None and not third.near_tie
    shorter = first_difference(same, same[:1])
    assert shorter is not None and shorter.place == 1 and shorter.candidate is None and not shorter.near_tie


def histogram(sampling: Sampling, logits: torch.Tensor, count: int = 1500) -> torch.Tensor:
    made = generate(
        Script(lambda _: logits, context=count + 1),
        torch.tensor([0]),
        max_new_tokens=count,
        sampling=sampling,
    )
    return torch.bincount(torch.tensor(made.tokens), minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawing_follows_the_tempered_distribution(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    found = histogram(Sampling(temperature, seed=3), logits)
    # four standard errors of a share of one half over 1,500 draws
    torch.testing.assert_close(found, (logits / temperature).softmax(-1), atol=0.052, rtol=0)


def test_top_p_keeps_the_smallest_sufficient_set():
    """Probabilities .5 .3 .15 .05: 0.5 is reached by the first alone, 0.51 needs the second."""
    logits = torch.tensor([0.3, 0.5, 0.05, 0.15]).log()
    assert histogram(Sampling(1.0, 0.5 - 1e-6), logits, 100).tolist() == [0, 1, 0, 0]
    two = histogram(Sampling(1.0, 0.51), logits)
    assert two[2] == two[3] == 0 and two[0] == pytest.approx(3 / 8, abs=0.052)
    assert (histogram(Sampling(1.0, 0.99), logits) > 0).all()


def test_seed_decides():
    session = Script(lambda _: torch.zeros(12), context=100)

    def draw(seed: int) -> list[int]:
        return generate(
            session, torch.tensor([0]), max_new_tokens=30, sampling=Sampling(1.0, seed=seed)
        ).tokens

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_sampling_refuses(values):
    with pytest.raises(InputError):
        Sampling(**{"temperature": 1.0, **values})
