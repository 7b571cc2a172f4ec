from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th

from agents.decoding.prefix_cache import ALLOCATION_STEP
from agents.models.causal import CausalBackbone
from tests.agents.architectures import ARCHITECTURES
from tests.agents.decoding.caches import (
    Counter,
    Rows,
    check,
    check_observed,
    observed,
    tokens,
)
from tests.agents.helpers import VOCAB, gpt2, llama, policy_for, ragged, vec_env


def test_context_matters(backbone: CausalBackbone) -> None:
    # Or else the tests below could not fail.
    first, second = backbone.next_hidden(ragged([[1, 2, 3, 4], [9, 2, 3, 4]]))
    assert (first - second).abs().max() > 1e-2


def test_growing_rows(backbone: CausalBackbone) -> None:
    rng = np.random.default_rng(0)
    rows = [tokens(rng, length) for length in (3, 1, 9)]
    for _ in range(12):
        check(backbone, rows)
        for row in rows:
            row += tokens(rng, 1)


def test_ragged_resets(backbone: CausalBackbone) -> None:
    rng = np.random.default_rng(1)
    rows = [tokens(rng, 4) for _ in range(5)]
    for _ in range(40):
        check(backbone, rows)
        for i in range(len(rows)):
            rows[i] = tokens(rng, int(rng.integers(1, 12))) if rng.random() < 0.2 else [*rows[i], 5]


def test_dialogue_prompts_grow_by_several_tokens(backbone: CausalBackbone) -> None:
    rng = np.random.default_rng(2)
    rows = [tokens(rng, 6) for _ in range(4)]
    for _ in range(20):
        check(backbone, rows)
        for row in rows:
            row += tokens(rng, 1 + int(rng.integers(9)) * (rng.random() < 0.3))


def test_rows_shrink_and_stay(backbone: CausalBackbone) -> None:
    long = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    for rows in (long, [row[:3] for row in long], long, [long[0][:1], long[1]], long, long):
        check(backbone, rows)


@pytest.mark.parametrize("changed", [0, 2, 4, 5])
def test_a_changed_token_is_seen_wherever_it_is(backbone: CausalBackbone, changed: int) -> None:
    row = [1, 2, 3, 4, 5, 6]
    check(backbone, [row, row])
    other = [*row]
    other[changed] = 40
    check(backbone, [[*other, 7], [*row, 7]])
    check(backbone, [[*row, 7], [*other, 7]])


def test_padding_that_equals_tokens_is_no_prefix(backbone: CausalBackbone) -> None:
    # `ragged` pads with 7: what was padding becomes tokens.
    check(backbone, [[1, 2], [1, 2, 3, 4, 5]])
    check(backbone, [[1, 2, 7, 7, 7], [1, 2, 3, 4, 5]])


def test_rows_swap(backbone: CausalBackbone) -> None:
    check(backbone, [[1, 2, 3], [4, 5, 6, 7]])
    check(backbone, [[4, 5, 6, 7, 8], [1, 2, 3, 9]])


def test_number_of_rows_changes(backbone: CausalBackbone) -> None:
    rng = np.random.default_rng(3)
    for count in (3, 1, 5, 3):
        check(backbone, [tokens(rng, 5) for _ in range(count)])


@pytest.mark.parametrize("start", [ALLOCATION_STEP - 3, 2 * ALLOCATION_STEP - 2])
def test_growth_over_the_allocation_step(backbone: CausalBackbone, start: int) -> None:
    rng = np.random.default_rng(4)
    rows = [tokens(rng, start), tokens(rng, 3), tokens(rng, start - 5)]
    for step in range(8):
        check(backbone, rows)
        for row in rows:
            row += tokens(rng, 1)
        if step == 4:
            rows[1] = tokens(rng, ALLOCATION_STEP)


def test_jumps_over_the_allocation_step_and_back(backbone: CausalBackbone) -> None:
    rng = np.random.default_rng(5)
    base = [tokens(rng, 200) for _ in range(3)]
    for lengths in ((10, 20, 30), (130, 20, 64), (63, 64, 65), (10, 128, 127), (200, 190, 1)):
        check(backbone, [row[:n] for row, n in zip(base, lengths, strict=True)])


def test_random_histories(backbone: CausalBackbone) -> None:
    rng = np.random.default_rng(6)
    base = [tokens(rng, 90) for _ in range(4)]
    for _ in range(60):
        rows = [row[: int(rng.integers(1, 90))] for row in base]
        if rng.random() < 0.3:
            rows[int(rng.integers(4))][-1] = 45
        check(backbone, rows)


@pytest.mark.parametrize("config", [gpt2, llama])
def test_eager_attention(config: Any) -> None:
    settings = config()
    settings._attn_implementation = "eager"
    with th.no_grad():
        backbone = CausalBackbone(settings, VOCAB, 256)
        assert backbone.config._attn_implementation == "eager"
        for rows in ([[1, 2, 3], [4]], [[1, 2, 3, 9, 9, 9], [4, 5]], [[1, 2], [5, 5, 5]]):
            check(backbone, rows)


def test_a_known_prefix_costs_only_the_rest(backbone: CausalBackbone) -> None:
    counter = Counter(backbone)

    def cost(rows: Rows) -> int:
        counter.tokens = 0
        backbone.next_hidden(ragged(rows))
        return counter.tokens

    first, second = [*range(1, 21)], [*range(21, 41)]
    cost([first, second])
    assert cost([[*first, 1], [*second, 1]]) == 2
    # A reply of five tokens: four to be read before the last.
    assert cost([[*first, 1, 2, 3, 4, 5, 6], [*second, 1, 2]]) == 2 + 4
    # A reset: the other row is not read again.
    assert cost([[50, 51, 52], [*second, 1, 2, 3]]) == 2 + 2
    assert cost([[50, 51, 52], [*second, 1, 2, 3]]) == 2


def cached_answer(backbone: CausalBackbone) -> th.Tensor:
    return backbone.next_hidden(ragged([[1, 2, 3, 4, 5]]))


@pytest.mark.parametrize("how", ["step", "load", "replace", "single", "module", "data"])
def test_weights_that_change_drop_the_cache(backbone: CausalBackbone, how: str) -> None:
    stale = cached_answer(backbone)
    keys = [parameter for name, parameter in backbone.named_parameters() if "attn" in name]
    with th.enable_grad():
        if how == "step":
            optimizer = th.optim.Adam(backbone.parameters(), lr=0.1)
            backbone.trunk(input_ids=th.tensor([[1, 2, 3]]), use_cache=False).pow(
                2
            ).sum().backward()
            optimizer.step()
    if how == "load":
        state = {name: value * 1.5 for name, value in backbone.state_dict().items()}
        backbone.load_state_dict(state)
    elif how == "replace":
        keys[0].data = keys[0].data * 1.5
    elif how == "single":
        keys[0][0] *= 1.5
    elif how == "module":
        state = {name: value * 1.5 for name, value in backbone.state_dict().items()}
        backbone.load_state_dict(state, assign=True)
    elif how == "data":
        for parameter in backbone.parameters():
            parameter.data.copy_(parameter.data * 1.5)
    fresh = backbone.last_hidden(ragged([[1, 2, 3, 4, 5]]))
    assert (fresh - stale).abs().max() > 1e-3
    assert (cached_answer(backbone) - fresh).abs().max() <= 1e-5


def test_predictions_notice_a_single_number_that_was_changed_through_data(
    backbone: CausalBackbone,
) -> None:
    rows = ragged([[1, 2, 3, 4, 5], [6, 7]])
    embeddings = next(name for name, _ in backbone.named_parameters())
    stale = backbone.next_hidden(rows, "predict")
    rollout = backbone.next_hidden(rows), backbone.decoder.memories["rollout"]
    backbone.next_hidden(rows, "predict")
    assert backbone.decoder.memories["rollout"] is rollout[1]  # nothing has changed
    backbone.get_parameter(embeddings).data[2, 5] += 3.0
    fresh = backbone.next_hidden(rows, "predict")
    assert (fresh - stale).abs().max() > 1e-3
    assert (fresh - backbone.last_hidden(rows)).abs().max() <= 1e-5


@pytest.mark.parametrize("scope", ["rollout", "predict"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["forward", "keep_rows"])
def test_nothing_is_remembered_after_an_exception(
    backbone: CausalBackbone, scope: Any, error: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    backbone.next_hidden(ragged(rows), scope)
    longer = [[*row, 20 + i] for i, row in enumerate(rows)]
    others = [[token + 30 for token in row] for row in longer]  # in the place of what is known

    def fail(*_: Any) -> Any:
        raise error("in the middle")

    if where == "forward":
        inner = [m for n, m in backbone.model.named_modules() if n.endswith("1.mlp")]
        hook = inner[0].register_forward_hook(fail)
        with pytest.raises(error, match="in the middle"):
            backbone.next_hidden(ragged(others), scope)
        hook.remove()
    elif scope == "rollout":
        cache = backbone.decoder.memories["rollout"]
        values = cache.key_values.values
        monkeypatch.setattr(cache.key_values, "values", {0: values[0], 1: None})
        with pytest.raises(AttributeError):
            backbone.keep_rows(np.array([1, 0]))
        assert "rollout" not in backbone.decoder.memories
        longer = longer[1::-1]
    answer = backbone.next_hidden(ragged(longer), scope)
    assert (answer - backbone.last_hidden(ragged(longer))).abs().max() <= 1e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.AdamW, th.optim.SGD])
def test_every_optimizer_step_is_noticed(optimizer: Any, fused: bool) -> None:
    # A fused step does not change the version that PyTorch keeps of a parameter.
    env = vec_env(num_envs=2)
    policy = policy_for(env, optimizer_class=optimizer, optimizer_kwargs={"fused": fused})
    policy.optimizer.param_groups[0]["lr"] = 0.5
    observations = {key: th.as_tensor(value) for key, value in env.reset().items()}
    with th.no_grad():
        stale = policy.get_distribution(observations).log_probs
    policy.evaluate_actions(observations, th.tensor([5, 6]))[1].sum().backward()
    with th.no_grad():  # remembered again, after the last time that gradients were computed
        assert th.equal(policy.get_distribution(observations).log_probs, stale)
    policy.optimizer.step()
    with th.no_grad():
        answer = policy.get_distribution(observations).log_probs
        policy.use_cache = False
        fresh = policy.get_distribution(observations).log_probs
    assert (fresh - stale).abs().max() > 1e-2
    assert (answer - fresh).abs().max() <= 1e-4


def test_training_mode_drops_the_memo_even_if_nobody_could_tell() -> None:
    env = vec_env(num_envs=2)
    policy = policy_for(env)
    observations = {key: th.as_tensor(value) for key, value in env.reset().items()}
    with th.no_grad():
        stale = policy.get_distribution(observations).log_probs
        for parameter in policy.backbone.parameters():
            parameter.data.mul_(1.5)  # which PyTorch keeps no count of
        policy.set_training_mode(True)
        policy.set_training_mode(False)
        answer = policy.get_distribution(observations).log_probs
        policy.use_cache = False
        fresh = policy.get_distribution(observations).log_probs
    assert (fresh - stale).abs().max() > 1e-2
    assert (answer - fresh).abs().max() <= 1e-4


def test_responses_that_grow_cost_a_token_each(backbone: CausalBackbone) -> None:
    counter = Counter(backbone)
    prompts: Rows = [[5, 6, 7], [8], [9, 10]]
    responses: Rows = [[], [], []]
    counts = []
    for step in range(6):
        counter.tokens = 0
        backbone.next_hidden(observed(prompts, responses))
        counts.append(counter.tokens)
        for response in responses:
            response.append(20 + step)
    assert counts[1:] == [3] * 5


@pytest.mark.parametrize("part", ["prompt", "response"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_rows_that_only_look_as_if_they_went_on(
    backbone: CausalBackbone, part: str, at: int
) -> None:
    """The lengths are those of a response that grew by a token, but another token has changed."""
    prompts, responses = [[5, 6, 7], [5, 6, 7]], [[8, 9, 10], [8, 9, 10]]
    check_observed(backbone, prompts, responses)
    responses = [[*row, 11] for row in responses]
    (prompts if part == "prompt" else responses)[1][at] = 30
    check_observed(backbone, prompts, responses)
    check_observed(backbone, prompts, [[*row, 12] for row in responses])


def test_random_episodes(backbone: CausalBackbone) -> None:
    """Tokens, turns, resets, repeated questions, steps back, and other episodes of like length."""
    rng = np.random.default_rng(7)
    prompts = [tokens(rng, int(rng.integers(1, 9))) for _ in range(4)]
    responses: Rows = [[] for _ in range(4)]
    for _ in range(80):
        check_observed(backbone, prompts, responses)
        for i in range(4):
            event = rng.random()
            full = len(responses[i]) == 12
            if event < 0.05 or len(prompts[i]) + len(responses[i]) > 20:  # another episode
                prompts[i], responses[i] = tokens(rng, int(rng.integers(1, 9))), []
            elif event < 0.1 and len(prompts[i]) + len(responses[i]) < 16:  # a reply
                prompts[i], responses[i] = [*prompts[i], *responses[i], 44], []
            elif event < 0.15 and responses[i]:  # a step back
                responses[i] = responses[i][:-1]
            elif event < 0.2:  # another one of the same length, and a token
                prompts[i] = tokens(rng, len(prompts[i]))
                responses[i] = [*responses[i], 3] if not full else responses[i]
            elif event < 0.95 and not full:
                responses[i] = [*responses[i], int(rng.integers(1, 50))]


@pytest.mark.parametrize("name", ["GPT-Neo (window)", "GPT", "RWKV", "RoBERTa as a decoder"])
def test_models_that_cannot_go_on_from_ragged_rows_compute_all_of_them(name: str) -> None:
    """GPT-Neo reckons where a query is from the number of keys; others have no keys at all."""
    with th.random.fork_rng(), pytest.warns(UserWarning, match="each token of a rollout will cost"):
        th.manual_seed(0)
        backbone = CausalBackbone(ARCHITECTURES[name](), VOCAB, 64)
    rng = np.random.default_rng(8)
    rows = [tokens(rng, length) for length in (3, 1, 9)]
    with th.no_grad():
        for _ in range(6):
            check(backbone, rows)
            for row in rows:
                row += tokens(rng, 1 + int(rng.integers(3)))
    assert not backbone.decoder.memories
