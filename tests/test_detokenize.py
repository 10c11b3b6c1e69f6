from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edkm_export.detokenize import TextStream
from edkm_export.errors import InputError

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


def answer(text: str, start: int) -> str:
    """What an answer of the bytes from `start` on says: from the character that holds the first of them."""
    content = text.encode()
    while start and start < len(content) and content[start] & 0xC0 == 0x80:
        start -= 1
    return content[start:].decode()


@settings(max_examples=500, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=12),
    st.data(),
)
def test_stream_equals_decoding_at_once(byte_level, text, data):
    """Any text, cut anywhere into a prompt and an answer, in the middle of a character too."""
    tokens = byte_level(text, add_special_tokens=False).input_ids
    cut = data.draw(st.integers(0, len(tokens)))
    known = len(b"".join(bytes_of(byte_level, token) for token in tokens[:cut]))
    shown = stream(byte_level, tokens[cut:], tokens[:cut])[1]
    assert shown == (answer(text, known) if cut < len(tokens) else "")


def bytes_of(tokenizer, token: int) -> bytes:
    """By the alphabet of byte-level tokenizers: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
    return bytes(letters[letter] for letter in tokenizer.convert_ids_to_tokens(token))


@settings(max_examples=500, deadline=None)
@given(st.text("abé東\U0001f680ñ", max_size=10), st.data())
def test_bytes_at_the_end_of_a_prompt(byte_fallback, text, data):
    """A run of byte tokens is decoded as a whole: the window must not begin inside of it."""
    tokens = [
        token
        for letter in text
        for token in ([259 + "ab".index(letter)] if letter in "ab" else list(letter.encode()))
    ]
    cut = data.draw(st.integers(0, len(tokens)))
    known = cut  # each token is one byte here
    shown = stream(byte_fallback, tokens[cut:], tokens[:cut])[1]
    assert shown == (answer(text, known) if cut < len(tokens) else "")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tokens(byte_level, data):
    """Also such that no tokenizer would give: broken characters in the middle and at the end."""
    tokens = data.draw(st.lists(st.integers(0, 1023), max_size=12))
    prompt = data.draw(st.lists(st.integers(300, 1023), max_size=3))
    start = byte_level.decode(prompt, skip_special_tokens=True)
    whole = byte_level.decode(prompt + tokens, skip_special_tokens=True)
    assume("\N{REPLACEMENT CHARACTER}" not in start)  # the tests above are about those
    assert stream(byte_level, tokens, prompt)[1] == whole[len(start) :]


def test_space_behind_a_special_token(byte_fallback):
    """A special token has no text: the space that a first word loses is kept by the word before it."""
    byte_fallback.add_special_tokens({"eos_token": "</s>"})
    end = byte_fallback.eos_token_id
    assert stream(byte_fallback, [258], [257, end])[1] == " world"


class Broken:
    def decode(self, tokens, **_):
        raise RuntimeError("no such token\nand more")


def test_tokenizer_that_raises():
    with pytest.raises(InputError, match=r"cannot decode its own tokens \[7\]: no such token$"):
        TextStream(Broken()).push(7)
    with pytest.raises(InputError, match="no such token"):
        TextStream(Broken(), [1, 2])
