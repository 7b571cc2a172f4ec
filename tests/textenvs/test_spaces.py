"""`TokenSpace`: a `Discrete` that knows the vocabulary."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from textenvs import TokenSpace


def test_it_is_a_discrete_space_of_the_whole_vocabulary() -> None:
    space = TokenSpace(10, eos_token_id=2, pad_token_id=3, allowed_tokens=[7, 5, 5])
    assert isinstance(space, spaces.Discrete)
    assert space.allowed_tokens == (5, 7)
    assert space.contains(9) and space.contains(np.int64(0)) and not space.contains(10)


def test_samples_are_allowed_tokens_by_the_seed() -> None:
    space = TokenSpace(10, 2, 3, [5, 7], seed=0)
    samples = [space.sample() for _ in range(50)]
    assert set(samples) == {5, 7} and isinstance(samples[0], np.int64)
    space.seed(0)
    assert [space.sample() for _ in range(50)] == samples
    free = TokenSpace(10, 2, 3, seed=0)
    assert {int(free.sample()) for _ in range(200)} == set(range(10))


def twin(space: TokenSpace, seed: int) -> TokenSpace:
    return TokenSpace(
        int(space.n), space.eos_token_id, space.pad_token_id, space.allowed_tokens, seed
    )


def test_a_mask_is_discretes() -> None:
    space = TokenSpace(4, 2, 3, [1], seed=0)
    assert space.sample(mask=np.array([1, 0, 0, 0], dtype=np.int8)) == 0
    assert space.sample(probability=np.array([0.0, 0.0, 0.0, 1.0])) == 3


@pytest.mark.parametrize(
    "other",
    [
        TokenSpace(11, 2, 3, [5]),
        TokenSpace(10, 1, 3, [5]),
        TokenSpace(10, 2, 2, [5]),
        TokenSpace(10, 2, 3, [5, 6]),
        TokenSpace(10, 2, 3),
        "x",
    ],
)
def test_equality_includes_the_special_tokens(other: object) -> None:
    space = TokenSpace(10, 2, 3, [5])
    assert space == twin(space, 4) and space != other and other != space
    assert space == spaces.Discrete(10) and spaces.Discrete(10) == space


def test_copies_keep_everything() -> None:
    space = TokenSpace(10, 2, 3, [5, 7], seed=1)
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert other == space and isinstance(other, TokenSpace)
        assert other.sample() == copy.deepcopy(space).sample()


def test_a_batch_is_multi_discrete() -> None:
    batch = batch_space(TokenSpace(10, 2, 3, [5]), 4)
    assert batch == spaces.MultiDiscrete([10] * 4)
    assert batch.contains(np.array([0, 9, 5, 3]))


def test_its_name_says_what_confines_it() -> None:
    assert repr(TokenSpace(10, 2, 3, [5, 7])) == "TokenSpace(10, eos_token_id=2, allowed=2)"
    assert repr(TokenSpace(10, 2, 3)) == "TokenSpace(10, eos_token_id=2, allowed=all)"
