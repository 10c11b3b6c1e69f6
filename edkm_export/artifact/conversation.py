"""A conversation with a model: turns, in the chat template of its tokenizer, in one session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from edkm_export.artifact.protocol import Session
from edkm_export.errors import InputError
from edkm_export.prompt import encode_turns

__all__ = ["Conversation"]

_ROOM_SHARE = 4  # of the context, at most, is kept free for an answer


@dataclass
class Conversation:
    """Turns, and what of them the session has read.

    A session cannot take tokens back, so a turn goes on where the cache ends as long as the template repeats what was
    read; otherwise everything is read again.

    Attributes:
        session: of the model.
        tokenizer: of transformers, with a chat template.
        where: the model, for messages.
        turns: what was said so far, {"role", "content"} each.
        forgotten: turns that were dropped, since the context does not hold them.
    """

    session: Session
    tokenizer: Any
    where: str
    turns: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0
    _read: list[int] = field(default_factory=list)

    def ask(self, said: str, max_new_tokens: int) -> tuple[Tensor, int]:
        """Add what the user says.

        The oldest turns are dropped while the context does not hold all of them and an answer; an answer counts with
        `max_new_tokens`, but with no more than a quarter of the context.

        Args:
            said: by the user.
            max_new_tokens: of the answer.

        Returns:
            Tokens of the whole conversation, int64 [tokens], and how many of them the session has read.

        Raises:
            InputError: what is said alone does not fit, or see `encode_turns`; the conversation is as it was.
        """
        context = self.session.context
        room = min(max_new_tokens, context // _ROOM_SHARE)
        turns = [*self.turns, {"role": "user", "content": said}]
        while True:
            tokens = encode_turns(self.tokenizer, turns, self.where)
            if len(tokens) + room <= context or len(turns) == 1:
                break
            turns = turns[2:]  # a question and its answer
        if len(tokens) > context:
            raise InputError(
                f"this turn has {len(tokens):,} tokens, but the context holds {context:,}; shorten it."
            )
        self.forgotten += len(self.turns) + 1 - len(turns)
        self.turns = turns
        ids = tokens.tolist()
        known = len(self._read)
        # The last token has to be read, whatever comes: its logits choose the next one.
        repeats = ids[:known] == self._read and known < len(ids)
        return tokens, known if repeats else 0

    def answered(self, text: str, read: list[int]) -> None:
        """Add the answer.

        Args:
            text: what was answered.
            read: all tokens that the session has read by now.
        """
        self.turns.append({"role": "assistant", "content": text})
        self._read = read
