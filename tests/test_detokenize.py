from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edkm_export.detokenize import TextStream

TEXTS = [
    "Hello world",
    " two  spaces , and . punctuation n't",
    "Grüße, 東京, \U0001f469‍\U0001f680 and é",
    "\n\n\ttabs\n",
    "€€€",
]


@pytest.fixture(scope="module")
def byte_level(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def byte_fallback():
    """Like Llama 2: a space is part of the word behind it, and unknown characters are single bytes."""
    words = ["▁", "▁Hello", "▁world", "a", "b", "▁and"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        word: 256 + place for place, word in enumerate(words)
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token=None))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stream(tokenizer, tokens: list[int], prompt: list[int]) -> tuple[list[str], str]:
    """What each token shows, and all together."""
    text = TextStream(tokenizer, prompt)
    shown = [text.push(token) for token in tokens]
    return shown, "".join(shown) + text.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_all_text_comes_out(byte_level, text):
    tokens = byte_level(text).input_ids
    shown, whole = stream(byte_level, tokens, [])
    assert whole == text
    assert "\N{REPLACEMENT CHARACTER}" not in whole
    assert all(piece == "" or not piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in shown)


def test_characters_come_whole(byte_level):
    """The tokenizer has seen no emoji: it takes its four bytes apart."""
    tokens = byte_level("\U0001f680").input_ids
    assert len(tokens) == 4
    shown, _ = stream(byte_level, tokens, [])
    assert shown == ["", "", "", "\U0001f680"]


def test_text_comes_as_soon_as_it_is_certain(byte_level):
    tokens = byte_level("Hello world").input_ids
    shown, _ = stream(byte_level, tokens, [])
    assert all(shown) and len(shown) == len(tokens)


def test_space_of_a_first_word_is_kept_behind_a_prompt(byte_fallback):
    hello, world = 257, 258
    assert byte_fallback.decode([world]) == "world"
    assert stream(byte_fallback, [world, world], [hello])[1] == " world world"
    assert stream(byte_fallback, [hello, world], [])[1] == "Hello world"


def test_byte_fallback(byte_fallback):
    tokens = [258, *"é".encode(), 261, *"東".encode()]
    shown, whole = stream(byte_fallback, tokens, [257])
    assert whole == " worldé and東"
    assert shown == [" world", "", "é", " and", "", "", "東"]


def test_incomplete_end_comes_out_as_replacement(byte_level):
    tokens = byte_level("a\U0001f680").input_ids[:-1]
    _, whole = stream(byte_level, tokens, [])
    assert whole.startswith("a") and set(whole[1:]) == {"\N{REPLACEMENT CHARACTER}"}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stream_equals_decoding_at_once(byte_level, data):
    """Any tokens, also such that no tokenizer would give: broken characters in the middle and at the end."""
    tokens = data.draw(st.lists(st.integers(0, 1023), max_size=12))
    prompt = data.draw(st.lists(st.integers(300, 1023), max_size=3))
    start = byte_level.decode(prompt[-1:], skip_special_tokens=True)
    whole = byte_level.decode(prompt[-1:] + tokens, skip_special_tokens=True)
    assume(
        "\N{REPLACEMENT CHARACTER}" not in start
    )  # a prompt that ends inside a character has no text of its own
    assert stream(byte_level, tokens, prompt)[1] == whole[len(start) :]
