"""Tokenizers with pieces of their own for what an encoder-decoder writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from tests.textenvs.marian import PIECES, marian_tokenizer
from textenvs.text.codec import TextCodec

pytest.importorskip("sentencepiece")
ENGLISH, GERMAN = "the cat sleeps", "die Katze"


@pytest.mark.parametrize("joint", [True, False])
def test_responses_have_the_pieces_of_their_language(joint: bool, tmp_path: Path) -> None:
    tokenizer: Any = marian_tokenizer(tmp_path, joint)
    codec = TextCodec(tokenizer, "encoder")
    assert codec.two_vocabularies is not joint
    assert codec.vocabulary_size >= max(PIECES.values())
    expected = tokenizer(text_target=GERMAN)["input_ids"]
    assert codec.encode_response(GERMAN, ENGLISH).tolist() == expected
    assert expected != tokenizer(GERMAN)["input_ids"]
    assert codec.decode_response(expected) == GERMAN
    assert codec.encode_prompt(ENGLISH).tolist() == tokenizer(ENGLISH)["input_ids"]
    env: Any = gym.make("Translation-v0", tokenizer=codec)
    example = env.unwrapped.engine.examples[0]
    env.reset(options={"example": 0})
    for token in codec.encode_response(example.references[0], example.prompt):
        *_, info = env.step(int(token))
    assert info["transcript"].response == example.references[0]


def test_what_was_said_in_other_ids_is_never_read(tmp_path: Path) -> None:
    codec = TextCodec(marian_tokenizer(tmp_path, joint=False), "encoder")
    with pytest.raises(ValueError, match=r"up to \d+ turns, and the tokenizer has a"):
        gym.make("Dialogue-v0", tokenizer=codec)


def test_ends_must_be_the_same_in_both_vocabularies(tmp_path: Path) -> None:
    tokenizer: Any = marian_tokenizer(tmp_path, joint=False)
    tokenizer.target_encoder["<pad>"] = 7
    with pytest.raises(ValueError, match=r"'<pad>' is 2, and another .* in which it is 7"):
        TextCodec(tokenizer, "encoder")
