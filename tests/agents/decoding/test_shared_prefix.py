"""Steps of rows that go on from one prompt are those of rows by themselves."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from agents import GRPO
from agents.decoding import shared_prefix
from agents.decoding.shared_prefix import LEAST_KEYS
from agents.models.causal import CausalBackbone
from tests.agents.agents import collect, train
from tests.agents.helpers import CONFIGS, FEW, gpt2
from tests.textenvs.toys import Echo
from textenvs import Example

GROUPS, MEMBERS = 3, 5
ROWS = GROUPS * MEMBERS


def observations(said: int, rows: Any = slice(None)) -> dict[str, Any]:
    """Prompts of different lengths, each of several rows, and so many tokens of response."""
    random = np.random.default_rng(1)
    lengths = np.array([[LEAST_KEYS + 20], [LEAST_KEYS + 3], [LEAST_KEYS + 11]])
    every = {
        "prompt": random.integers(0, 300, (GROUPS, LEAST_KEYS + 20)).repeat(MEMBERS, axis=0),
        "prompt_length": lengths.repeat(MEMBERS, axis=0),
        "response": random.integers(0, 300, (ROWS, 12)),
        "response_length": np.full((ROWS, 1), said),
    }
    return {name: values[rows] for name, values in every.items()}


def backbone(config: Any, **options: Any) -> CausalBackbone:
    return CausalBackbone(config, config.vocab_size, 120, **options)


@pytest.mark.parametrize("name", list(CONFIGS))
@th.no_grad()
def test_hidden_states_are_those_of_separate_rows(name: str) -> None:
    model = backbone(CONFIGS[name]())
    rows = np.arange(ROWS)
    for said in range(9):
        seen = observations(said, rows)
        expected = model.last_hidden(seen)
        assert (model.next_hidden(seen) - expected).abs().max() < 2e-5
        shared = model.decoder.memories["rollout"].shared
        assert shared is not None and shared.length == LEAST_KEYS + 2
        if said in (2, 5):  # some have ended, and the groups are no longer even
            left = rows[rows % 7 != said]
            model.keep_rows(np.searchsorted(rows, left))
            rows = left


@th.no_grad()
def test_rows_that_begin_anew_end_it() -> None:
    model = backbone(gpt2())
    for said in range(4):
        seen = observations(said)
        if said == 2:  # another prompt
            seen["prompt"][4] = 7
            seen["response_length"][4] = 0
        assert (model.next_hidden(seen) - model.last_hidden(seen)).abs().max() < 2e-5
        cache = model.decoder.memories["rollout"]
        assert (cache.shared is None) == (said >= 2)


@pytest.mark.parametrize("rows", [slice(0, ROWS, MEMBERS), slice(3, 8)])
@th.no_grad()
def test_where_few_rows_have_it_in_common_nothing_is_shared(rows: slice) -> None:
    model = backbone(gpt2())
    model.next_hidden(observations(0, rows))
    assert model.decoder.memories["rollout"].shared is None


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_rollout_and_its_update_agree(autocast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(Echo):
        def examples(self, split: str) -> Any:
            return [Example(f"{i} " + "word and " * LEAST_KEYS) for i in range(4)]

    calls = [0]
    attend = shared_prefix.SharedPrefix.by_group

    def counted(self: Any, rows: th.Tensor) -> th.Tensor:
        calls[0] += 1
        return attend(self, rows)

    monkeypatch.setattr(shared_prefix.SharedPrefix, "by_group", counted)
    envs = gym.make_vec("TextGen-v0", num_envs=8, group_size=4, task=Long, max_new_tokens=8)
    policy = {"model": gpt2(n_layer=1), "allowed_tokens": FEW, "autocast": autocast}
    model = GRPO("TransformerPolicy", envs, seed=0, device="cpu", policy_kwargs=policy)
    collect(model)
    assert calls[0] > 8
    assert train(model).log["train/first_ratio_error"] < (1e-5 if autocast is None else 0.05)
