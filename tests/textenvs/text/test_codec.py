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
from textenvs.text.codec import TextCodec
from textenvs.text.loading import EOS_TOKEN, PAD_TOKEN, embedded_tokenizer, load_tokenizer

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
    assert TextCodec(hf_tokenizer).pad_token_id == hf_tokenizer.eos_token_id


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
    with pytest.raises(ValueError, match=f"from '{tmp_path}': .* Expected a folder written by sav"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"'nobody/nothing': OSError: .* a hub id needs a connec"):
        load_tokenizer("nobody/nothing")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        hf_tokenizer.save_pretrained(str(tmp_path))
        (tmp_path / file).write_text((tmp_path / file).read_text()[:20])
        with pytest.raises(ValueError, match=f"': the file {file} is damaged. JSONDecodeError: "):
            load_tokenizer(str(tmp_path))
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
    if (kind, task) == ("wordpiece", "TextClassification-v0"):
        with pytest.raises(ValueError, match="gives back '' for the choice 'negative'"):
            TextEngine(task, 2, tokenizer=tokenizer)
        task = "Translation-v0"
    engine = TextEngine(task, 2, tokenizer=tokenizer)
    for slot in range(2):
        engine.reset(slot, np.random.default_rng(slot))
    rngs = [np.random.default_rng(slot) for slot in range(2)]
    for token in (5, 6, engine.eos_token_id):
        engine.step(np.array([token, token]), rngs, np.flatnonzero([True, token == 5]))
        if len(engine.turns[0]) == 2:
            break
    assert state(tokenizer) == before and engine.tokenizer is tokenizer


def test_a_codec_knows_the_special_tokens_and_the_vocabulary(
    wordpiece: PreTrainedTokenizerBase,
) -> None:
    codec = TextCodec(wordpiece)
    assert codec.tokenizer is wordpiece
    assert (codec.vocabulary_size, codec.eos_token_id, codec.pad_token_id) == (11, 3, 0)
    assert codec.stop_token_ids == (3,)
    assert TextCodec(wordpiece, stop_token_ids=[10, 3]).stop_token_ids == (3, 10)
    with pytest.raises(ValueError, match=r"stop_token_ids must be token ids in \[0, 11\).*\(3, 11"):
        TextCodec(wordpiece, stop_token_ids=[11])
    with pytest.raises(ValueError, match="'causal' or 'encoder', but it is 'decoder'"):
        TextCodec(wordpiece, "decoder")  # type: ignore[arg-type]


def test_a_vocabulary_with_gaps_ends_behind_its_largest_id(
    hf_tokenizer: PreTrainedTokenizerBase,
) -> None:
    class Gaps(type(hf_tokenizer)):  # type: ignore[misc]
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "far": 999}

    gaps = copy.deepcopy(hf_tokenizer)
    gaps.__class__ = Gaps
    assert TextCodec(gaps).vocabulary_size == 1000 > len(gaps)


def test_prompts_have_the_tokenizers_specials_and_replies_none(
    wordpiece: PreTrainedTokenizerBase,
) -> None:
    codec = TextCodec(wordpiece)
    (prompt,) = codec.encode_prompts(["the food"])
    assert prompt.tolist() == [2, 4, 5] and prompt.dtype == np.int64
    assert TextCodec(wordpiece, "encoder").encode_prompts(["food"])[0].tolist() == [2, 5, 3]
    assert codec.encode_reply("the foods").tolist() == [4, 5, 8]
    assert codec.encode_response("was good", "the food").tolist() == [7, 6, 3]
    assert codec.encode_response("was good", "the food", eos=False).tolist() == [7, 6]


def test_an_empty_prompt_becomes_one_token(
    wordpiece: PreTrainedTokenizerBase, hf_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = TextCodec(wordpiece).encode_prompts(("", "food"))
    assert [p.tolist() for p in prompts] == [[2], [2, 5]]
    assert TextCodec(wordpiece).encode_prompts(()) == ()
    for tokenizer in (hf_tokenizer, embedded_tokenizer()):
        (prompt,) = TextCodec(tokenizer).encode_prompts([""])
        assert prompt.tolist() == [tokenizer.eos_token_id]


def test_a_response_is_separated_from_what_is_before_it() -> None:
    codec = TextCodec()
    eos = codec.eos_token_id
    assert codec.encode_response("good", "The food").tolist() == [*encode(" good"), eos]
    assert codec.encode_response("good", "Say:\n").tolist() == [*encode("good"), eos]
    assert codec.encode_response("good", "").tolist() == [*encode("good"), eos]
    assert codec.encode_response("", "").tolist() == [eos]


def test_behind_an_encoder_a_response_begins_without_a_space() -> None:
    codec = TextCodec(None, "encoder")
    assert codec.encode_response("good", "The food").tolist() == [
        *encode("good"),
        codec.eos_token_id,
    ]
    assert encode("good") != encode(" good")
    engine = TextEngine(Echo, tokenizer=codec)
    engine.reset(0, np.random.default_rng(0), 0)
    assert engine.encode_response("so good").tolist() == [*encode("so good"), codec.eos_token_id]


def test_decoding_leaves_out_specials_and_outer_space() -> None:
    codec = TextCodec()
    ids = [codec.pad_token_id, *encode(" it is n't  so , no ? "), codec.eos_token_id]
    assert codec.decode_response(ids) == "it is n't  so , no ?"
    assert codec.decode_response(np.array(ids)) == codec.decode_response(ids)
    assert codec.decode_response([]) == codec.decode_response([codec.eos_token_id]) == ""


def test_the_stop_token_that_ends_a_response_is_no_text() -> None:
    (stop,) = encode("!")
    codec = TextCodec(stop_token_ids=[stop])
    assert codec.decode_response([*encode("a!b"), stop]) == "a!b"
    assert codec.is_stop(np.array([[stop, 5], [codec.eos_token_id, stop]])).tolist() == [
        [True, False],
        [True, True],
    ]


@pytest.mark.parametrize("kind", ["hf_tokenizer", "wordpiece"])
def test_demonstrations_come_back_as_they_were(kind: str, request: pytest.FixtureRequest) -> None:
    codec = TextCodec(request.getfixturevalue(kind))
    for text in ("was good", "the foods was nice"):
        ids = codec.encode_response(text, "the food")
        assert ids[-1] == codec.eos_token_id
        assert codec.decode_response(ids[:-1]) == codec.decode_response(ids) == text
        assert codec.given_back(text) == text


def test_what_comes_back_of_a_text(wordpiece: PreTrainedTokenizerBase) -> None:
    assert TextCodec(wordpiece).given_back("was bad") == "was"  # an unknown word
    assert TextCodec().given_back("good\n") == "good"
    assert TextCodec().given_back("ñandú 🙂\n漢字") == "ñandú 🙂\n漢字"


def test_word_pieces_make_a_text_environment(wordpiece: PreTrainedTokenizerBase) -> None:
    from textenvs.envs.env import TextEnv

    data = [Example("the food", ("was good",)), Example("the nice food", ("was nice .",))]
    check_text_env(TextEnv(Chat, wordpiece, data), episodes=6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a tokenizer encodes inputs."""
    calls: list[int] = []
    original = type(embedded_tokenizer()).__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(embedded_tokenizer()), "__call__", count)
    return calls


def test_prompts_are_encoded_once(calls: list[int]) -> None:
    """Also across environments: "sync" and "async" make many of the same."""
    tokenizer = copy.deepcopy(embedded_tokenizer())
    for _ in range(3):
        TextEngine(Echo, tokenizer=tokenizer)
    assert len(calls) == 1


def test_tokens_added_after_a_first_use_are_known_to_the_next_codec(calls: list[int]) -> None:
    tokenizer = copy.deepcopy(embedded_tokenizer())
    old = TextCodec(tokenizer)
    before = old.encode_prompts(["The food"])[0].tolist()
    assert before == encode("The food")
    tokenizer.add_tokens(["The food"])
    new = TextCodec(tokenizer)
    assert new.vocabulary_size == old.vocabulary_size + 1
    assert new.encode_prompts(["The food"])[0].tolist() == [old.vocabulary_size]
    assert len(calls) == 2
