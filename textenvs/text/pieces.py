"""Text that is encoded in pieces: behind other text, and between special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from textenvs.text.special import BREAK, tokens_around

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a piece is encoded behind: the first of them that stays apart from it.
ANCHORS = ("(", "\n", "a")


class PieceEncoder:
    """Encodes texts as a model reads them in one piece, though they come one after the other.

    Many tokenizers (SentencePiece's, and byte-level ones with `add_prefix_space`) put a space in
    front of every text, also of one that goes on in the middle of a word or with a new line.

    Args:
        tokenizer: The tokenizer, which is not changed.
        target: Whether the texts are what an encoder-decoder writes: some tokenizers (Marian's)
            have pieces of their own for the language of these.

    Attributes:
        before: The special tokens in front of an input.
        behind: Those behind it.
        adds_space: Whether text that is encoded by itself begins with a space that is not in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, target: bool = False) -> None:
        self._tokenizer = tokenizer
        self._target = target
        self.before, self.behind = tokens_around(tokenizer)
        joined = ((self._ids(f"{part}a"), self._ids(part) + self._ids("a")) for part in "(0")
        self.adds_space = all(whole != apart for whole, apart in joined)

    def whole(self, text: str) -> list[int]:
        """Encode a text that nothing comes before."""
        first, *more = text.split(BREAK)
        return [*self._ids(first), *(token for part in more for token in self._behind_text(part))]

    def continuation(self, text: str, after: str = ANCHORS[0]) -> list[int]:
        """Encode a text that continues another.

        Args:
            text: What continues it.
            after: The last character of the other, where it is known.
        """
        first, *more = text.split(BREAK)
        ids = self._behind_text(first, after)
        return [*ids, *(token for part in more for token in self._behind_text(part))]

    def inputs(self, texts: Sequence[str], closed: bool) -> list[list[int]]:
        """Encode texts with the special tokens around an input, each of them once.

        Args:
            texts: The texts.
            closed: Whether the tokens behind an input belong there, too.
        """
        firsts = [text.partition(BREAK)[0] for text in texts]
        # verbose=False: a prompt longer than the model's positions is reported by the environment.
        encoded = self._tokenizer(firsts, add_special_tokens=False, verbose=False) if texts else {}
        before, behind = self.before, self.behind if closed else []
        inputs = []
        for text, alone in zip(texts, encoded.get("input_ids", ()), strict=True):
            ids = self.whole(text) if BREAK in text else alone
            # A template may have written them already.
            ids = ids if ids[: len(before)] == before else [*before, *ids]
            ids = ids if ids[len(ids) - len(behind) :] == behind else [*ids, *behind]
            inputs.append(ids)
        return inputs

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        """Decode what continues a text, with the space that it begins with, if there is one."""
        ids = list(tokens)
        if self.adds_space:
            anchor = self._ids(ANCHORS[0])
            before, text = (
                self._text(part, skip_special_tokens) for part in (anchor, anchor + ids)
            )
            if text.startswith(before):
                return text[len(before) :]
        return self._text(ids, skip_special_tokens)

    def _behind_text(self, text: str, after: str = ANCHORS[0]) -> list[int]:
        if text and self.adds_space:
            for anchor in (after, *ANCHORS):
                before, both = self._ids(anchor), self._ids(anchor + text)
                if both[: len(before)] == before:
                    return both[len(before) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        if self._target:
            encoded = self._tokenizer(text_target=text, add_special_tokens=False, verbose=False)
            return cast("list[int]", encoded["input_ids"])
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False))

    def _text(self, ids: list[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return cast("str", text)
