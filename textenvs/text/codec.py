"""The one place that knows tokenizers: prompts, replies and responses as token ids, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt

from textenvs.text.chat import chat_template_of, check_system_prompt
from textenvs.text.loading import fingerprint, load_tokenizer, model_is_seq2seq, model_stop_ids
from textenvs.text.messages import Message
from textenvs.text.pieces import PieceEncoder
from textenvs.text.special import Breaker, special_ids, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = npt.NDArray[np.int64]


class TextCodec:
    """Turns text into the token ids that a model reads and emits, and back.

    Args:
        tokenizer: None (the embedded one), a name or path that `AutoTokenizer.from_pretrained`
            takes, or a tokenizer, which is used as it is and never changed.
        convention: What kind of model reads the prompts. "causal": it goes on from the prompt, so
            that a space separates the two, and no special token stands between them. "encoder":
            prompt and response are separate inputs; the prompt ends with the special tokens that
            the tokenizer puts there, and the response begins without a space. None: that of the
            model beside the tokenizer, if there is one, else "causal".
        stop_token_ids: Tokens that end a turn as well as EOS does, and as well as those that the
            tokenizer's folder has in its generation_config.json.
        stop_strings: Texts that end a turn as soon as they have been said. They are no part of the
            response.
        separator: What a causal model says between a prompt and a response. None: a space, unless
            the prompt ends in white space; where a task has choices, always a space.
        split_special_tokens: Whether the texts of examples and users are text alone, so that
            "<|eos|>" in one of them is read as seven characters. False: special tokens in them are
            meant as such, as in prompts that a chat template has rendered.
        chat_template: Whether prompts are chats. "auto": if the tokenizer has a template and the
            model is causal; True: by the tokenizer's own; False: no; else a Jinja template, or a
            file that holds one.
        system_prompt: What a chat begins with, unless an example's own begins with another.

    Attributes:
        tokenizer: The tokenizer.
        vocabulary_size: How many ids there are: `len(tokenizer)`, or more if its ids have gaps.
        two_vocabularies: Whether an id means one thing in prompts and another in responses.
        chat_template: False, True, or the template, as it was found to be.
        chat: What renders conversations, or None: prompts are text.
        eos_token_id: The token that ends an encoded response: what the chat template ends a turn
            with, else EOS.
        stop_token_ids: All tokens that end a turn, this one first.
        stop_strings: All texts that end a turn.
        pad_token_id: The token that fills observations: the tokenizer's, or EOS for the many
            tokenizers that have no pad token.

    Raises:
        ValueError: If the tokenizer cannot be loaded or has no EOS token, or has two vocabularies
            with other ids for EOS or padding, or a stop token is none
            of its ids, or a stop string is empty, or the convention is unknown.
        TypeError: If the tokenizer is something else.
    """

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        convention: Literal["causal", "encoder"] | None = None,
        stop_token_ids: Iterable[int] = (),
        stop_strings: Iterable[str] = (),
        separator: str | None = None,
        split_special_tokens: bool = True,
        chat_template: bool | str | Path = "auto",
        system_prompt: str | None = None,
    ) -> None:
        if convention is None:
            convention = "encoder" if model_is_seq2seq(tokenizer) else "causal"
        if convention not in ("causal", "encoder"):
            raise ValueError(f"convention must be 'causal' or 'encoder', but it is {convention!r}.")
        self.tokenizer = load_tokenizer(tokenizer)
        self._pieces = PieceEncoder(self.tokenizer)
        self._responses = self._pieces
        if convention == "encoder" and not self.tokenizer.is_fast:
            self._responses = PieceEncoder(self.tokenizer, target=True)
        self.two_vocabularies = bool(getattr(self.tokenizer, "separate_vocabs", False))
        if self.two_vocabularies:
            _check_roles(self.tokenizer)
        self.convention = convention
        self.separator = separator
        self.split_special_tokens = split_special_tokens
        self.vocabulary_size = _vocabulary_size(self.tokenizer, fingerprint(self.tokenizer))
        self._special_ids = special_ids(self.tokenizer)
        if chat_template == "auto" and not split_special_tokens:
            chat_template = False  # prompts that have been rendered already
        self.chat = chat_template_of(self.tokenizer, chat_template, self.convention)
        own = int(cast("int", self.tokenizer.eos_token_id))
        self.eos_token_id = own
        if self.chat is not None:
            self.separator = self.chat.separator if separator is None else separator
            self.eos_token_id = self._end_of_a_turn(self.chat.turn_end, own)
        self.chat_template = self.chat is not None and (self.chat.template or True)
        check_system_prompt(self.chat, system_prompt)
        self.system_prompt = system_prompt
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = own if pad is None else int(cast("int", pad))
        models = [i for i in model_stop_ids(tokenizer) if 0 <= i < self.vocabulary_size]
        stops = (self.eos_token_id, own, *map(int, stop_token_ids), *models)
        self.stop_token_ids = tuple(dict.fromkeys(stops))
        if not all(0 <= token < self.vocabulary_size for token in self.stop_token_ids):
            raise ValueError(
                f"stop_token_ids must be token ids in [0, {self.vocabulary_size}), but they are "
                f"{self.stop_token_ids}."
            )
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else (*stop_strings,)
        if not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise ValueError(f"stop_strings must be texts, none empty, not {self.stop_strings!r}.")
        # A character takes one token at least, and a byte one at most.
        self._stop_window = 1 + max((len(s.encode()) for s in self.stop_strings), default=0)
        specials = special_texts(self.tokenizer)
        if self.chat is not None:
            added = map(str, getattr(self.tokenizer, "added_tokens_decoder", {}).values())
            marks = {text for text in added if text in self.chat.written}
            specials = tuple(sorted({*specials, *marks}, key=lambda text: (-len(text), text)))
        self.as_text = Breaker(specials if split_special_tokens else ())
        ids = {*self.stop_token_ids, self.pad_token_id, self.tokenizer.bos_token_id} - {None}
        roles = set(self.tokenizer.convert_ids_to_tokens(list(cast("set[int]", ids))))
        self._without_roles = Breaker(text for text in specials if text in roles)
        self._given_back: dict[str, str] = {}

    @property
    def target_ids(self) -> frozenset[int] | None:
        """What a response may consist of where prompts have ids of their own. None: anything."""
        if not self.two_vocabularies:
            return None
        return frozenset(_target_vocabulary(self.tokenizer).values())

    def with_system_prompt(self, system_prompt: str | None) -> TextCodec:
        """Return the codec, or one like it whose chats begin with another system prompt.

        Raises:
            ValueError: If there is no chat template, or it leaves the system prompt out.
            TypeError: If it is no text.
        """
        if system_prompt == self.system_prompt:
            return self
        check_system_prompt(self.chat, system_prompt)
        other = copy.copy(self)
        other.system_prompt = system_prompt
        return other

    def begun(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with the system prompt in front, unless they have one."""
        if self.system_prompt is None or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def encode_prompts(self, texts: Iterable[str]) -> tuple[TokenIds, ...]:
        """Encode prompts with the special tokens that belong around an input, each once.

        A chat template has written those that it wants.

        An empty prompt becomes one token (BOS, else EOS), since a model needs something to read.
        The same texts are encoded once for a tokenizer, however many environments ask for them.

        Args:
            texts: The prompts; what came through `as_text` is encoded as text.
        """
        key = fingerprint(self.tokenizer)
        return _encode_prompts(self.tokenizer, key, self._closed, tuple(texts))

    def encode_prompt(self, text: str) -> TokenIds:
        """Encode one prompt; it is not remembered."""
        return _encode(self.tokenizer, self._closed, [text])[0]

    @property
    def _closed(self) -> bool | None:
        """Whether special tokens belong behind a prompt. None: nothing belongs around a chat."""
        return None if self.chat is not None else self.convention == "encoder"

    def cuts(self, text: str) -> list[int]:
        """Return where a text may be cut, from 0 to its length: behind tokens, if that is known."""
        if not self.tokenizer.is_fast:
            return list(range(len(text) + 1))
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return sorted({0, len(text), *(end for _, end in encoded["offset_mapping"])})

    def encode_reply(self, text: str) -> TokenIds:
        """Encode what continues a conversation, as if it were read in one piece with it.

        Args:
            text: The reply; what came through `as_text` is encoded as text.

        Raises:
            ValueError: If the tokenizer has got more tokens since the codec was made.
        """
        return self._checked(self._pieces.continuation(text))

    def encode_response(self, text: str, prompt: str | None, eos: bool = True) -> TokenIds:
        """Encode a response as an agent would emit it after `prompt`.

        Special tokens in it, such as `<think>`, are what the agent emits, but for those that begin,
        end or fill texts. It ends where a stop string or a stop token ends it.

        Args:
            text: The response.
            prompt: The text that it follows; see `separator`. None: whatever it is.
            eos: Whether EOS ends the response.
        """
        text = self._without_roles(text)
        if self.convention == "encoder" or prompt == "":
            ids = self._checked(self._responses.whole(text))
        else:
            after = (prompt or "(")[-1]
            ids = self._checked(self._pieces.continuation(self._separator(prompt) + text, after))
        end = self.stop_position(ids)
        if end is not None:
            return ids[: end + 1]
        return np.append(ids, self.eos_token_id).astype(np.int64) if eos else ids

    def decode_response(self, ids: Sequence[int] | TokenIds) -> str:
        """Return the text of emitted tokens, without special tokens and surrounding white space.

        What ends them, a stop token or a stop string, is no part of the text.
        """
        return self.decode_turn(ids)[0]

    def decode_turn(self, ids: Sequence[int] | TokenIds) -> tuple[str, str]:
        """Return what `decode_response` does, and the raw text, without the last stop token alone.

        The raw text has the special tokens, the white space and the stop string.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) and self.is_stop(tokens[-1:])[0]:
            tokens = tokens[:-1]
        said = tokens.tolist()
        raw = text = self._responses.decode(said, skip_special_tokens=False)
        if not self._special_ids.isdisjoint(said):
            text = self._responses.decode(said, skip_special_tokens=True)
        ends = [text.find(stop) for stop in self.stop_strings if stop in text]
        return text[: min(ends, default=len(text))].strip(), raw

    def given_back(self, text: str) -> str:
        """Return a text as the tokenizer gives it back, which is all that a response can be.

        Tokenizers that lower-case, or that have no token for a character, change texts.
        """
        if text not in self._given_back:
            self._given_back[text] = self.decode_response(self.encode_response(text, None))
        return self._given_back[text]

    def is_stop(self, tokens: TokenIds) -> npt.NDArray[np.bool_]:
        """Return which of the tokens end a turn; the result has the shape of `tokens`."""
        stops = tokens == self.stop_token_ids[0]
        for token in self.stop_token_ids[1:]:
            stops |= tokens == token
        return cast("npt.NDArray[np.bool_]", stops)

    def has_stopped(self, response: TokenIds) -> bool:
        """Return whether the last token of a response, (n,), ends it, as a token or by its text."""
        if not len(response):
            return False
        if self.is_stop(response[-1:])[0]:
            return True
        if not self.stop_strings:
            return False
        tail = response[-self._stop_window :].tolist()
        said = self._responses.decode(tail, skip_special_tokens=False)
        return any(stop in said for stop in self.stop_strings)

    def stop_position(self, response: TokenIds) -> int | None:
        """Return the position of the first token that ends a response; None: it goes on."""
        if not self.stop_strings:
            stops = np.flatnonzero(self.is_stop(response))
            return int(stops[0]) if len(stops) else None
        ends = (i for i in range(len(response)) if self.has_stopped(response[: i + 1]))
        return next(ends, None)

    def behind_turn(self, tokens: TokenIds, text: str) -> TokenIds:
        """Encode what stands behind a response, but for a chat's end of a turn that was said.

        Args:
            tokens: The response.
            text: What continues the conversation, in a chat `ChatTemplate.continuation`.
        """
        added = self.encode_reply(text)
        if self.chat is None:
            return added
        ends = np.flatnonzero(added == self.eos_token_id)
        if len(tokens) and tokens[-1] == self.eos_token_id and len(ends):
            before = self._pieces.decode(added[: ends[0]].tolist(), skip_special_tokens=False)
            return added if before.strip() else added[ends[0] + 1 :]
        return added

    def _end_of_a_turn(self, text: str, eos: int) -> int:
        """Return the token that a template puts first behind a response, if it is one of its own.

        Args:
            text: What it puts there.
            eos: What it is otherwise.
        """
        own = {*self._special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
        for token in self._pieces.continuation(text):
            if token in own:
                return token
            if self._pieces.decode([token], skip_special_tokens=False).strip():
                break
        return eos

    def _separator(self, prompt: str | None) -> str:
        if self.separator is not None:
            return self.separator
        return "" if prompt is not None and prompt[-1].isspace() else " "

    def _checked(self, ids: list[int]) -> TokenIds:
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) and tokens.max() >= self.vocabulary_size:
            raise ValueError(
                f"The tokenizer has given the id {tokens.max()}, but it had {self.vocabulary_size} "
                "ids when the environment was made: add tokens before, or make it again."
            )
        return tokens


def codec_of(
    tokenizer: str | Path | PreTrainedTokenizerBase | TextCodec | None,
    stop: str | int | Sequence[str | int] | None,
    chat_template: bool | str | Path = "auto",
) -> TextCodec:
    """Return the codec of a tokenizer whose turns end with these texts and tokens, too.

    Raises:
        ValueError: If it is a codec already, and there are texts or tokens, or a template.
        TypeError: If they are something else.
    """
    if isinstance(tokenizer, TextCodec):
        if stop is not None:
            raise ValueError(
                "A TextCodec says by itself what ends a turn: give it stop_token_ids and "
                f"stop_strings, and leave stop={stop!r} out."
            )
        if chat_template != "auto":
            raise ValueError("A TextCodec has a chat_template of its own: give it there.")
        return tokenizer
    stops = [] if stop is None else [stop] if isinstance(stop, (str, int)) else list(stop)
    wrong = [s for s in stops if isinstance(s, bool) or not isinstance(s, (str, int, np.integer))]
    if wrong:
        raise TypeError(f"stop must be texts and token ids, but it has {wrong[0]!r}.")
    return TextCodec(
        tokenizer,
        stop_token_ids=[int(token) for token in stops if not isinstance(token, str)],
        stop_strings=[text for text in stops if isinstance(text, str)],
        chat_template=chat_template,
    )


@lru_cache(maxsize=8)
def _vocabulary_size(tokenizer: PreTrainedTokenizerBase, key: str) -> int:
    ids = [*tokenizer.get_vocab().values(), *_target_vocabulary(tokenizer).values()]
    return max(len(tokenizer), 1 + max(ids))


def _target_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of a vocabulary for responses alone; Marian's `get_tgt_vocab` is not whole."""
    return dict(getattr(tokenizer, "target_encoder", {}))


def _check_roles(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that what ends and fills texts is one id in both vocabularies of a tokenizer."""
    targets = _target_vocabulary(tokenizer)
    for role in ("eos", "pad", "unk"):
        token, own = (getattr(tokenizer, f"{role}_token{what}") for what in ("", "_id"))
        if token is not None and targets.get(token) != own:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has a vocabulary for prompts, in which "
                f"{token!r} is {own}, and another for responses, in which it is "
                f"{targets.get(token)}: both must have the same id for what ends and fills texts."
            )


@lru_cache(maxsize=64)
def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, key: str, closed: bool | None, texts: tuple[str, ...]
) -> tuple[TokenIds, ...]:
    return _encode(tokenizer, closed, texts)  # `key` says what the tokenizer is like now


def _encode(
    tokenizer: PreTrainedTokenizerBase, closed: bool | None, texts: Sequence[str]
) -> tuple[TokenIds, ...]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pieces = PieceEncoder(tokenizer)
    if closed is None:
        encoded = [pieces.whole(text) for text in texts]
    else:
        encoded = pieces.inputs(texts, closed)
    return tuple(np.asarray(ids or [start], dtype=np.int64) for ids in encoded)
