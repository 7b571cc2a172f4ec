"""Versions instead of comparisons, rows that leave, and what is let go."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch as th

from agents.decoding.copies import PREPACK_AFTER
from agents.decoding.tokens import Scope
from agents.models.causal import CausalBackbone
from tests.agents.decoding.caches import (
    Counter,
    Rows,
    Versioned,
    check,
    made,
    observed,
    tokens,
)
from tests.agents.helpers import ragged


def test_prompts_of_a_version_are_not_compared(backbone: CausalBackbone) -> None:
    """Whoever gives versions answers for them: a prompt that changed under its version stays."""
    counter = Counter(backbone)
    prompts, others = [[5, 6, 7], [8, 9]], [[30, 6, 7], [30, 9]]
    backbone.next_hidden(Versioned(observed(prompts, [[20], [20]]), [1, 2]))
    expected = [
        backbone.trunk(input_ids=th.tensor([row]), use_cache=False)[0, -1]
        for row in ([5, 6, 7, 20, 21], [30, 9, 20, 21])
    ]
    counter.tokens = 0
    observation = Versioned(observed(others, [[20, 21], [20, 21]]), [1, 3])
    answer = backbone.next_hidden(observation)
    assert (answer - th.stack(expected)).abs().max() <= 1e-5
    assert counter.tokens == 2 + 3  # the row of another version is read again


@pytest.mark.parametrize("versions", ["before", "after"])
def test_without_versions_on_both_sides_prompts_are_compared(
    backbone: CausalBackbone, versions: str
) -> None:
    first, second = observed([[5, 6, 7]], [[20]]), observed([[30, 6, 7]], [[20, 21]])
    backbone.next_hidden(Versioned(first, [1]) if versions == "before" else first)
    answer = backbone.next_hidden(Versioned(second, [1]) if versions == "after" else second)
    expected = backbone.trunk(input_ids=th.tensor([[30, 6, 7, 20, 21]]), use_cache=False)[:, -1]
    assert (answer - expected).abs().max() <= 1e-5


def test_random_episodes_with_versions(backbone: CausalBackbone) -> None:
    """Resets, replies and repeated questions, of which some come without versions."""
    rng = np.random.default_rng(9)
    prompts = [tokens(rng, 4) for _ in range(3)]
    responses: Rows = [[] for _ in range(3)]
    versions = [0, 1, 2]
    for step in range(60):
        observation: Any = observed(prompts, responses)
        if rng.random() < 0.9:
            observation = Versioned(observation, versions)
        answer = backbone.next_hidden(observation)
        for i in range(3):
            row = th.tensor([[*prompts[i], *responses[i]]])
            expected = backbone.trunk(input_ids=row, use_cache=False)[0, -1]
            assert (answer[i] - expected).abs().max() <= 1e-5
            if len(prompts[i]) + len(responses[i]) > 18 or rng.random() < 0.1:
                prompts[i], responses[i], versions[i] = tokens(rng, 4), [], 3 * step + 10 + i
            elif rng.random() < 0.1:
                reply = [*prompts[i], *responses[i], 44]
                prompts[i], responses[i], versions[i] = reply, [], 3 * step + 10 + i
            elif rng.random() < 0.9:
                responses[i] = [*responses[i], int(rng.integers(1, 50))]


@pytest.mark.parametrize("keep", [[0, 2], [2, 1], [1], []])
def test_rows_that_are_kept_go_on_at_the_cost_of_a_step(
    backbone: CausalBackbone, keep: list[int]
) -> None:
    prompts: Rows = [[5, 6, 7], [8], [9, 10]]
    responses: Rows = [[20], [21, 22], [23]]
    backbone.next_hidden(Versioned(observed(prompts, responses), [1, 2, 3]))
    backbone.keep_rows(np.array(keep, dtype=np.intp))
    kept = backbone.decoder.memories["rollout"].key_values
    assert {len(tensor) for tensor in (*kept.keys.values(), *kept.values.values())} == {len(keep)}
    counter = Counter(backbone)
    for token in (30, 31, 32) if keep else ():
        counter.tokens = 0
        responses = [[*response, token] for response in responses]
        rows = [prompts[i] for i in keep], [responses[i] for i in keep]
        answer = backbone.next_hidden(Versioned(observed(*rows), [i + 1 for i in keep]))
        assert counter.tokens == len(keep)
        for prompt, response, hidden in zip(*rows, answer, strict=True):
            row = th.tensor([[*prompt, *response]])
            expected = backbone.trunk(input_ids=row, use_cache=False)[0, -1]
            assert (hidden - expected).abs().max() <= 1e-5


def test_compiled_rows_that_are_kept_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "compile", lambda function, **_: function)
    backbone = made("llama", compiled=True)
    backbone.keep_rows(np.array([0]))  # before anything is remembered
    rows = [[1, 2, 3], [4], [5, 6]]
    with th.no_grad():
        for count in (3, 2, 3, 1):
            check(backbone, rows[:count])
            backbone.keep_rows(np.arange(count - 1))


def test_cleared_caches_let_their_memory_go(backbone: CausalBackbone) -> None:
    backbone.start_rollout(PREPACK_AFTER)
    held = []
    scopes: tuple[Scope, ...] = ("rollout", "predict")
    for scope in scopes:
        backbone.next_hidden(ragged([[1, 2, 3], [4]]), scope)
        kept = backbone.decoder.memories[scope].key_values
        held += [weakref.ref(tensor) for tensor in (*kept.keys.values(), *kept.values.values())]
        del kept
    assert all(reference() is not None for reference in held)
    backbone.clear_cache()
    assert all(reference() is None for reference in held)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_a_failed_forward_left_is_not_used(backbone: CausalBackbone, error: Any) -> None:
    rows = [[1, 2, 3], [4, 5]]
    check(backbone, rows)

    def fail(*_: Any) -> None:
        raise error

    other = [[9, 8, 7, 6], [4, 5, 6]]
    layer = [m for n, m in backbone.model.named_modules() if n.endswith(".mlp")][-1]
    hook = layer.register_forward_hook(fail)
    with pytest.raises(error):
        backbone.next_hidden(ragged(other))
    hook.remove()
    check(backbone, [[*row, 3] for row in rows])
    check(backbone, other)
