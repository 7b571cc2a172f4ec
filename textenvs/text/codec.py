"""The one place that knows tokenizers: prompts, replies and responses as token ids, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt

from textenvs.text.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = npt.NDArray[np.int64]


class TextCodec:
    """Turns text into the token ids that a model reads and emits, and back.

    Args:
        tokenizer: None (the embedded one), a name or path that `AutoTokenizer.from_pretrained`
            takes, or a tokenizer, which is used as it is and never changed.
        convention: What kind of model reads the prompts. "causal": it goes on from the prompt, so
            that a space separates the two. "encoder": prompt and response are separate inputs, and
            the response begins without a space.
        stop_token_ids: Tokens that end a turn as well as EOS does.

    Attributes:
        tokenizer: The tokenizer.
        vocabulary_size: How many ids there are: `len(tokenizer)`, or more if its ids have gaps.
        eos_token_id: The token that ends an encoded response.
        stop_token_ids: All tokens that end a turn, EOS first.
        pad_token_id: The token that fills observations: the tokenizer's, or EOS for the many
            tokenizers that have no pad token.

    Raises:
        ValueError: If the tokenizer cannot be loaded or has no EOS token, or a stop token is none
            of its ids, or the convention is unknown.
        TypeError: If the tokenizer is something else.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        convention: Literal["causal", "encoder"] = "causal",
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        if convention not in ("causal", "encoder"):
            raise ValueError(f"convention must be 'causal' or 'encoder', but it is {convention!r}.")
        self.tokenizer = load_tokenizer(tokenizer)
        self.convention = convention
        self.vocabulary_size = _vocabulary_size(self.tokenizer, _fingerprint(self.tokenizer))
        self.eos_token_id = int(cast("int", self.tokenizer.eos_token_id))
        self.stop_token_ids = tuple(dict.fromkeys((self.eos_token_id, *map(int, stop_token_ids))))
        if not all(0 <= token < self.vocabulary_size for token in self.stop_token_ids):
            raise ValueError(
                f"stop_token_ids must be token ids in [0, {self.vocabulary_size}), but they are "
                f"{self.stop_token_ids}."
            )
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else int(cast("int", pad))

    def encode_prompts(self, texts: Iterable[str]) -> tuple[TokenIds, ...]:
        """Encode prompts with the special tokens that the tokenizer puts around an input.

        An empty prompt becomes one token (BOS, else EOS), since a model needs something to read.
        The same texts are encoded once for a tokenizer, however many environments ask for them.
        """
        return _encode_prompts(self.tokenizer, _fingerprint(self.tokenizer), tuple(texts))

    def encode_reply(self, text: str) -> TokenIds:
        """Encode what continues a conversation: no special tokens are added."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def encode_response(self, text: str, prompt: str, eos: bool = True) -> TokenIds:
        """Encode a response as an agent would emit it after `prompt`.

        Args:
            text: The response.
            prompt: The text that it follows: a causal model's response is separated from it by a
                space, unless it ends in white space.
            eos: Whether EOS ends the response.
        """
        joined = self.convention == "causal" and prompt != "" and not prompt[-1].isspace()
        ids = self.encode_reply(f" {text}" if joined else text)
        return np.append(ids, self.eos_token_id).astype(np.int64) if eos else ids

    def decode_response(self, ids: Sequence[int] | TokenIds) -> str:
        """Return the text of emitted tokens, without special tokens and surrounding white space.

        The stop token that ends them, if there is one, is no part of the text.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) and self.is_stop(tokens[-1:])[0]:
            tokens = tokens[:-1]
        text = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cast("str", text).strip()

    def round_trips(self, text: str, prompt: str = "") -> bool:
        """Return whether a response is decoded to the very text that was encoded.

        Tokenizers that lower-case, or that have no token for a character, change texts. Such a
        label or reference could never be matched by a response.

        Args:
            text: The response.
            prompt: The text that it follows.
        """
        return self.decode_response(self.encode_response(text, prompt)) == text

    def is_stop(self, tokens: TokenIds) -> npt.NDArray[np.bool_]:
        """Return which of the tokens end a turn; the result has the shape of `tokens`."""
        stops = tokens == self.stop_token_ids[0]
        for token in self.stop_token_ids[1:]:
            stops |= tokens == token
        return cast("npt.NDArray[np.bool_]", stops)


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """Return the tokens that a user may add to a tokenizer or change after its first use.

    It is part of the keys of the caches below, which would otherwise miss such a change.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return (*named, *((token, str(text)) for token, text in added.items()))


@lru_cache(maxsize=8)
def _vocabulary_size(tokenizer: PreTrainedTokenizerBase, fingerprint: tuple[object, ...]) -> int:
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


@lru_cache(maxsize=64)
def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, fingerprint: tuple[object, ...], texts: tuple[str, ...]
) -> tuple[TokenIds, ...]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # verbose=False: a prompt longer than the model's positions is reported by the environment.
    encoded = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return tuple(np.asarray(ids or [start], dtype=np.int64) for ids in encoded)
