"""The tokenizer that a file's metadata describes, as a fast tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_settings import GgufSettings
from edkm_export.reference.gguf.split_patterns import SPLITS

__all__ = ["Vocabulary"]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_OTHER_ROLES = (
    "seperator",  # spelt so in the format
    "cls",
    "mask",
    "fim_pre",
    "fim_suf",
    "fim_mid",
    "fim_pad",
    "fim_rep",
    "fim_sep",
    "prefix",
    "suffix",
    "middle",
)


class Vocabulary:
    """Tokens, merges and flags of a file.

    Args:
        settings: the file's keys; those of the tokenizer are taken from it.
    """

    def __init__(self, settings: GgufSettings) -> None:
        self.path, self.arch = settings.path, settings.arch
        self.kind = settings.text("tokenizer.ggml.model", "none")
        self.tokens: list[str] = settings.items("tokenizer.ggml.tokens", str, [])
        self.types: list[int] = settings.items("tokenizer.ggml.token_type", int, [])
        self.scores: list[float] = settings.items("tokenizer.ggml.scores", float, [])
        self.merges: list[str] = settings.items("tokenizer.ggml.merges", str, [])
        self.split = settings.text("tokenizer.ggml.pre", None)
        self.space_prefix = settings.flag("tokenizer.ggml.add_space_prefix", self.kind == _SENTENCEPIECE)
        begins = self.kind == _SENTENCEPIECE or (self.split in SPLITS and SPLITS[self.split].begins)
        self.begins = settings.flag("tokenizer.ggml.add_bos_token", begins)
        self.ends = settings.flag("tokenizer.ggml.add_eos_token", False)
        self.template = settings.text("tokenizer.chat_template", None)
        self.special = {
            role: settings.integer(f"tokenizer.ggml.{key}_token_id", None)
            for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        }
        self._check(settings)
        self._leave(settings)

    def _check(self, settings: GgufSettings) -> None:
        if self.kind not in (_BYTE_LEVEL, _SENTENCEPIECE, "none"):
            settings.refuse(
                "tokenizer.ggml.model",
                f"{self.kind!r} is not supported; {_BYTE_LEVEL} and {_SENTENCEPIECE} are",
            )
        if self.kind == _BYTE_LEVEL and self.split not in SPLITS:
            settings.refuse(
                "tokenizer.ggml.pre",
                f"{self.split!r} is not supported; supported are {', '.join(sorted(SPLITS))}",
            )
        if self.kind == _SENTENCEPIECE and self.split not in (None, "default"):
            settings.refuse("tokenizer.ggml.pre", f"{self.split!r} has no meaning for this kind of tokenizer")
        if self.kind == _BYTE_LEVEL and self.space_prefix:
            settings.refuse("tokenizer.ggml.add_space_prefix", "is not supported for this kind of tokenizer")
        for key in ("add_sep_token", "remove_extra_whitespaces"):
            if settings.flag(f"tokenizer.ggml.{key}", False):
                settings.refuse(f"tokenizer.ggml.{key}", "is not supported")
        if settings.raw("tokenizer.ggml.precompiled_charsmap"):
            settings.refuse("tokenizer.ggml.precompiled_charsmap", "is not supported")
        count = len(self.tokens)
        for key, values in (("token_type", self.types), ("scores", self.scores)):
            if values and len(values) != count:
                settings.refuse(f"tokenizer.ggml.{key}", f"holds {len(values)} values for {count} tokens")
        for role, number in self.special.items():
            if number is not None and number >= count:
                self.special[role] = None

    def _leave(self, settings: GgufSettings) -> None:
        for name in _OTHER_ROLES:
            settings.ignore(f"tokenizer.ggml.{name}_token_id", "a role that plays no part in a text")
        settings.ignore("tokenizer.ggml.token_type_count", "of encoders")
        settings.ignore("tokenizer.huggingface.json", "the other keys describe the same tokenizer")
        names = settings.items("tokenizer.chat_templates", str, [])
        settings.ignore("tokenizer.chat_templates", "other chat templates than the main one")
        for name in names:
            settings.ignore(f"tokenizer.chat_template.{name}", "another chat template than the main one")

    @property
    def is_empty(self) -> bool:
        """Whether the file holds no tokenizer."""
        return self.kind == "none" or not self.tokens

    def build(self) -> Any:
        """The tokenizer.

        Returns:
            transformers.PreTrainedTokenizerFast.

        Raises:
            SourceError: the file holds none, or one whose parts do not fit together.
        """
        from transformers import PreTrainedTokenizerFast

        if self.is_empty:
            raise SourceError(f"{self.path}: holds no tokenizer; tokenizer.ggml.tokens is missing.")
        try:
            backend = self._byte_level() if self.kind == _BYTE_LEVEL else self._sentencepiece()
        except Exception as error:  # what tokenizers raises for a bad vocabulary has no class of its own
            raise SourceError(f"{self.path}: its tokenizer cannot be built ({error}).") from error
        self._add_whole_tokens(backend)
        self._frame(backend)
        roles = {
            f"{role}_token": self.tokens[number]
            for role, number in self.special.items()
            if number is not None
        }
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
            **roles,
        )
        made.chat_template = self.template
        return made

    def _byte_level(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        split = SPLITS[self.split]
        model = models.BPE(
            vocab=_numbered(self.tokens), merges=self._pairs(), ignore_merges=split.whole_words
        )
        backend = Tokenizer(model)
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
        spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, spelling])
        backend.decoder = decoders.ByteLevel()
        return backend

    def _pairs(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) for merge in self.merges]
        wrong = next((merge for merge, pair in zip(self.merges, pairs, strict=True) if len(pair) != 2), None)
        if wrong is not None:
            raise ValueError(f"tokenizer.ggml.merges holds {wrong!r}, expected two tokens")
        return pairs  # type: ignore[return-value]

    def _sentencepiece(self) -> Any:
        """Pairs are merged in the order of their scores, or of their numbers where scores say nothing (Gemma)."""
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        gemma = self.arch.startswith("gemma")
        # runs of spaces are stored as spaces there, but the text is spelt with the visible one
        tokens = [_SPACE * len(t) if gemma and " " in t and not t.strip(" ") else t for t in self.tokens]
        if not gemma and len(self.scores) != len(tokens):
            raise ValueError("tokenizer.ggml.scores is missing")
        ranks = range(len(tokens)) if gemma else [-score for score in self.scores]
        unknown = self.special["unk"]
        model = models.BPE(
            vocab=_numbered(tokens),
            merges=self._pairs() if self.merges else _implied_merges(tokens, ranks),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        backend = Tokenizer(model)
        spell = normalizers.Replace(" ", _SPACE)
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend(_SPACE), spell]) if self.space_prefix else spell
        )
        if gemma:
            backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.space_prefix:
            steps.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(steps)
        return backend

    def _add_whole_tokens(self, backend: Any) -> None:
        """Tokens that a text holds as a whole, before any splitting."""
        from tokenizers import AddedToken

        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            whole = [
                AddedToken(token, normalized=False, special=special)
                for token, found in zip(self.tokens, self.types, strict=False)
                if found == kind and backend.token_to_id(token) is not None
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(whole)

    def _frame(self, backend: Any) -> None:
        """Tokens around a text."""
        from tokenizers import processors

        wanted = {"bos": self.begins, "eos": self.ends}
        ids = {
            role: self.special[role] for role, on in wanted.items() if on and self.special[role] is not None
        }
        names = {role: self.tokens[number] for role, number in ids.items()}
        parts = [[names["bos"]] if "bos" in names else [], ["$A"], [names["eos"]] if "eos" in names else []]
        single = [each for part in parts for each in part]
        byte_level = [processors.ByteLevel(trim_offsets=False)] if self.kind == _BYTE_LEVEL else []
        template = [
            processors.TemplateProcessing(
                single=single,
                pair=single + [each.replace("$A", "$B") + ":1" for each in single],
                special_tokens=[(name, ids[role]) for role, name in names.items()],
            )
        ]
        backend.post_processor = processors.Sequence(byte_level + (template if names else []))


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _implied_merges(tokens: Sequence[str], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, those of low rank first."""
    numbers = _numbered(tokens)
    found = []
    for number, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in numbers and right in numbers:
                found.append((ranks[number], numbers[left], numbers[right], left, right))
    found.sort(key=lambda each: each[:3])
    return [(left, right) for *_, left, right in found]
