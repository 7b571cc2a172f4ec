"""Tokenizers: the embedded one, Hugging Face ones of other kinds, and what bad ones are told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
import pytest

from tests.textenvs.toys import Chat, Echo, encode
from textenvs import Example
from textenvs.checks import check_text_env
from textenvs.envs.engine import TextEngine
from textenvs.text.codec import (
    EOS_TOKEN,
    PAD_TOKEN,
    decode_response,
    embedded_tokenizer,
    encode_continuation,
    encode_prompts,
    encode_response,
    load_tokenizer,
    pad_token_id,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ("plain", "ñandú 🙂 漢字", "tabs\tand\nlines", "don't  stop", "\u200b\x00\uffff", "<|eos|")


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerBase:
    """Like BERT's: word pieces, unknown words, and [CLS] ... [SEP] around each input."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "food", "good", "was", "##s", "nice", "."]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


def state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Everything that a tokenizer says about itself."""
    backend = cast("Any", tokenizer).backend_tokenizer.to_str()
    return backend, tokenizer.special_tokens_map, len(tokenizer), tokenizer.padding_side


@pytest.mark.parametrize("text", TEXTS)
def test_the_embedded_tokenizer_encodes_any_text(text: str) -> None:
    tokenizer = embedded_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_the_embedded_tokenizer_has_eos_and_another_pad() -> None:
    tokenizer = load_tokenizer(None)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS_TOKEN, PAD_TOKEN)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert load_tokenizer(None) is tokenizer


def test_tokenizers_by_path_and_as_objects(
    hf_tokenizer: PreTrainedTokenizerBase, hf_tokenizer_path: str
) -> None:
    assert load_tokenizer(hf_tokenizer) is hf_tokenizer
    for path in (hf_tokenizer_path, Path(hf_tokenizer_path)):
        assert load_tokenizer(path).get_vocab() == hf_tokenizer.get_vocab()
    assert pad_token_id(hf_tokenizer) == hf_tokenizer.eos_token_id


def test_a_tokenizer_without_pad_token_pads_with_eos(
    hf_tokenizer: PreTrainedTokenizerBase,
) -> None:
    bare = copy.deepcopy(hf_tokenizer)
    bare.pad_token = None
    engine = TextEngine(Echo, tokenizer=bare)
    assert bare.pad_token is None
    assert engine.pad_token_id == bare.eos_token_id == engine.action_space.pad_token_id
    assert (engine.observations["response"] == bare.eos_token_id).all()


def test_bad_tokenizers(hf_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"None, a name, a path or a transformers tokenizer.*a int"):
        load_tokenizer(5)  # type: ignore[arg-type]
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(ValueError, match=f"from '{name}'. Expected a folder written by save_"):
            load_tokenizer(name)
    endless = copy.deepcopy(hf_tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"has no EOS token.*eos_token=\.\.\."):
        load_tokenizer(endless)


@pytest.mark.parametrize("kind", ["hf_tokenizer", "wordpiece"])
@pytest.mark.parametrize("task", [Echo, Chat, "Dialogue-v0", "TextClassification-v0"])
def test_a_users_tokenizer_is_never_changed(
    kind: str, task: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    before = state(tokenizer)
    env = gym.make("TextGen-v0", tokenizer=tokenizer)
    assert env.spec is not None
    engine = TextEngine(task, 2, tokenizer=tokenizer)
    for slot in range(2):
        engine.reset(slot, np.random.default_rng(slot))
    rngs = [np.random.default_rng(slot) for slot in range(2)]
    for token in (5, 6, engine.eos_token_id):
        engine.step(np.array([token, token]), rngs, np.flatnonzero([True, token == 5]))
        if len(engine.turns[0]) == 2:
            break
    assert state(tokenizer) == before and engine.tokenizer is tokenizer


def test_prompts_have_the_tokenizers_specials_and_continuations_none(
    wordpiece: PreTrainedTokenizerBase,
) -> None:
    (prompt,) = encode_prompts(wordpiece, ("the food",))
    assert prompt.tolist() == [2, 4, 5, 3] and prompt.dtype == np.int64
    assert encode_continuation(wordpiece, "the foods").tolist() == [4, 5, 8]
    assert encode_response(wordpiece, "was good", "the food").tolist() == [7, 6, 3]
    assert encode_response(wordpiece, "was good", "the food", eos=False).tolist() == [7, 6]


def test_an_empty_prompt_becomes_one_token(
    wordpiece: PreTrainedTokenizerBase, hf_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert [p.tolist() for p in encode_prompts(wordpiece, ("", "food"))] == [[2, 3], [2, 5, 3]]
    assert encode_prompts(hf_tokenizer, ("",))[0].tolist() == [hf_tokenizer.eos_token_id]
    assert encode_prompts(wordpiece, ()) == ()
    embedded = embedded_tokenizer()
    assert encode_prompts(embedded, ("",))[0].tolist() == [embedded.eos_token_id]


def test_a_response_is_separated_from_what_is_before_it() -> None:
    tokenizer = embedded_tokenizer()
    eos = tokenizer.eos_token_id
    assert encode_response(tokenizer, "good", "The food").tolist() == [*encode(" good"), eos]
    assert encode_response(tokenizer, "good", "Say:\n").tolist() == [*encode("good"), eos]
    assert encode_response(tokenizer, "good", "").tolist() == [*encode("good"), eos]
    assert encode_response(tokenizer, "", "").tolist() == [eos]


def test_decoding_leaves_out_specials_and_outer_space() -> None:
    tokenizer = embedded_tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [pad, *encode(" it is n't  so , no ? "), eos]
    assert decode_response(tokenizer, ids) == "it is n't  so , no ?"
    assert decode_response(tokenizer, np.array(ids)) == decode_response(tokenizer, ids)
    assert decode_response(tokenizer, []) == ""


@pytest.mark.parametrize("kind", ["hf_tokenizer", "wordpiece"])
def test_demonstrations_come_back_as_they_were(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    for text in ("was good", "the foods was nice"):
        ids = encode_response(tokenizer, text, "the food")
        assert ids[-1] == tokenizer.eos_token_id
        assert decode_response(tokenizer, ids[:-1]) == text


def test_word_pieces_make_a_text_environment(wordpiece: PreTrainedTokenizerBase) -> None:
    from textenvs.envs.env import TextEnv

    data = [Example("the food", ("was good",)), Example("the nice food", ("was nice .",))]
    check_text_env(TextEnv(Chat, wordpiece, data), episodes=6)


def test_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also across environments: "sync" and "async" make many of the same."""
    tokenizer = copy.deepcopy(embedded_tokenizer())
    calls: list[int] = []
    original = type(tokenizer).__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    for _ in range(3):
        TextEngine(Echo, tokenizer=tokenizer)
    assert len(calls) == 1
