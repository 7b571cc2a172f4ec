"""Algorithms that compare whole episodes: by their definitions in float64, and beside TRL's."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from itertools import chain
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from agents import GRPO, PPO, RLOO, ExpertIteration, ReinforcePlusPlus, ReMax
from agents.algorithms.recipes import RECIPES, Recipe
from agents.learning.groups import groups_with_signal
from agents.learning.rewards import penalize_overlong
from tests.agents.agents import PLAIN_STEPS, collect, make_agent, shake, train
from tests.agents.helpers import EOS, FEW, llama
from tests.agents.oracle import Critic, Token, kl, read
from tests.test_readme import BLOCK, ROOT
from tests.textenvs.toys import Chat
from textenvs import CallableReward, Transcript

PAGE = (ROOT / "docs" / "groups.md").read_text(encoding="utf-8")
GROUP, SLOTS, EPISODES = 4, 8, 2
# By slot and number, the turns of each episode.
Episodes = dict[tuple[int, int], list[list[Token]]]
STILL: dict[str, Any] = {"learning_rate": 0.0, "max_grad_norm": 1e9, "batch_size": None}


class Talk(Chat):
    """Up to three turns: some responses end the conversation."""

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str | None:
        return None if len(transcript.response) % 3 == 0 else super().reply(transcript, rng)


def make(cls: Any = GRPO, kind: str = "one turn", group_size: int = GROUP, **kwargs: Any) -> Any:
    env = {"num_envs": SLOTS, "group_size": group_size, **kwargs.pop("env", {})}
    policy = {**PLAIN_STEPS, "temperature": 0.7, **kwargs.pop("policy", {})}
    if kind == "several turns":
        env["task"] = Talk
    settings = {**STILL, "n_epochs": 1, "episodes_per_slot": EPISODES, **kwargs}
    if cls is ReMax:
        settings.pop("batch_size")
    return make_agent(kind, env=env, policy=policy, cls=cls, **settings)


class Notes:
    """Takes down the tokens of slots that do not wait, slot by slot."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[Token]] = defaultdict(list)

    def __call__(self, rollout: dict[str, Any]) -> None:
        before, starts = rollout["self"]._last_obs, rollout["self"]._last_episode_starts
        for slot in rollout["slots"].tolist():
            self.tokens[slot].append(
                Token(
                    slot,
                    len(self.tokens[slot]),
                    read(before, slot),
                    int(rollout["actions"][slot]),
                    float(rollout["rewards"][slot]),
                    bool(starts[slot]),
                    bool(rollout["dones"][slot]),
                )
            )

    def episodes(self) -> Episodes:
        """By slot and number, the turns of each episode."""
        found: Episodes = {}
        for slot, tokens in self.tokens.items():
            number, said = -1, None
            for token in tokens:
                if token.starts:
                    number, said = number + 1, None
                    found[slot, number] = []
                if said != token.context:
                    found[slot, number].append([])
                found[slot, number][-1].append(token)
                said = [*token.context, token.token]
        return found


def compared(earned: list[float], every: list[float], baseline: str, scale: str) -> list[float]:
    """What each of a group's episodes earned, less a baseline, by a scale."""
    result = []
    for i, own in enumerate(earned):
        others = earned[:i] + earned[i + 1 :]
        less = {
            "group": statistics.fmean(earned),
            "leave_one_out": statistics.fmean(others) if others else own,
            "batch": statistics.fmean(every),
        }[baseline]
        deviation = {
            "none": 1.0 - 1e-4,
            "group": statistics.stdev(earned) if others else 0.0,
            "batch": statistics.stdev(every),
        }[scale]
        result.append((own - less) / (deviation + 1e-4))
    return result


def log_probs(actor: Critic, tokens: list[Token]) -> Any:
    """What each token of an episode was chosen by, (tokens, allowed): contexts are beginnings."""
    logits = actor.model(th.tensor([tokens[-1].context])).logits[0]
    rows = logits[[len(token.context) - 1 for token in tokens]]
    return (rows[:, FEW] / actor.temperature).log_softmax(-1)


def said(rows: Any, tokens: list[Token]) -> Any:
    """The log-probabilities of the tokens themselves."""
    return rows[range(len(tokens)), [FEW.index(token.token) for token in tokens]]


@th.no_grad()
def kl_of(tokens: list[Token], old: Critic, reference: Critic, estimator: str) -> dict[int, float]:
    """The KL to the reference of each of an episode's tokens."""
    mine, theirs = (said(log_probs(actor, tokens), tokens) for actor in (old, reference))
    return dict(zip(map(id, tokens), kl(mine, theirs, estimator).tolist(), strict=True))


def joined(turns: list[list[Token]]) -> list[Token]:
    """The tokens of turns, one turn after the other."""
    return list(chain.from_iterable(turns))


# What is compared: its tokens, and what was earned from the first of them on.
Unit = tuple[list[Token], float]


def compared_units(episodes: Episodes, paid: Any, model: Any) -> list[list[Unit]]:
    """The units that are compared with each other: episodes, or turns of the same number."""
    units: dict[tuple[int, int, int], list[Unit]] = defaultdict(list)
    for (slot, number), turns in sorted(episodes.items()):
        parts = turns if getattr(model, "by_turn", False) else [joined(turns)]
        for j, part in enumerate(parts):
            rest = joined(turns[j:])
            units[slot // model.group_size, number, j].append((part, sum(map(paid, rest))))
    return list(units.values())


def advantages_by_definition(episodes: Episodes, kls: dict[int, float], model: Any) -> Any:
    """By the id of each token, its advantage."""
    inside = model.kl_coef if model.kl_in == "reward" else 0.0

    def paid(token: Token) -> float:
        return token.reward - inside * kls[id(token)]

    units = compared_units(episodes, paid, model)
    if isinstance(model, ReinforcePlusPlus):
        return normalized(units, paid, model.baseline)
    advantages: dict[int, float] = {}
    every = [value for members in units for _, value in members]
    for members in units:
        earned = [value for _, value in members]
        numbers = compared(earned, every, model.baseline, model.scale)
        for (tokens, _), number in zip(members, numbers, strict=True):
            advantages.update({id(token): number for token in tokens})
    for turns in episodes.values() if model.kl_in == "advantage" else ():
        whole = joined(turns)
        for i, token in enumerate(whole):
            advantages[id(token)] -= model.kl_coef * sum(kls[id(t)] for t in whole[i:])
    return advantages


def normalized(units: list[list[Unit]], paid: Any, baseline: str) -> dict[int, float]:
    """REINFORCE++'s: returns to go, less the group's mean or not, normalised over all tokens."""
    advantages: dict[int, float] = {}
    for members in units:
        mean = statistics.fmean([value for _, value in members]) if baseline == "group" else 0.0
        for tokens, _ in members:
            for i, token in enumerate(tokens):
                advantages[id(token)] = sum(map(paid, tokens[i:])) - mean
    mean, std = statistics.fmean(advantages.values()), statistics.pstdev(advantages.values())
    return {key: (value - mean) / max(0.1, std) for key, value in advantages.items()}


def policy_term(model: Any, weight: Any, advantage: float, log_prob: Any) -> Any:
    """What the policy's loss has for a token whose ratio, or its response's, is a weight."""
    low = model.clip_range(1.0)
    high = low if model.clip_range_high is None else model.clip_range_high
    clip = getattr(model, "clip", "ppo")
    if clip == "ppo":
        return -min(weight * advantage, weight.clamp(1 - low, 1 + high) * advantage)
    if clip == "cispo":
        return -min(float(weight), high) * advantage * log_prob
    steep = 1.0 if advantage > 0 else 1.05
    return -advantage * 4 / steep / (1 + (-steep * (weight - 1)).exp())


def response_ratio(model: Any, differences: Any) -> Any:
    """The ratio of a whole response, or of each of its tokens."""
    level = "product" if isinstance(model, RLOO) else getattr(model, "ratio_level", "token")
    if level == "token":
        return differences.exp()
    power = differences.sum() / (len(differences) if level == "sequence" else 1)
    return power.exp().repeat(len(differences))


def loss_by_definition(
    episodes: Episodes,
    advantages: dict[int, float],
    old: Critic,
    new: Critic,
    reference: Critic | None,
    model: Any,
) -> Any:
    """What the update minimises, token by token."""
    total: Any = 0.0
    counted = sum(len(turn) for turns in episodes.values() for turn in turns)
    for turns in episodes.values():
        whole = joined(turns)
        rows = log_probs(new, whole)
        now = said(rows, whole)
        with th.no_grad():
            then = said(log_probs(old, whole), whole)
            theirs = then if reference is None else said(log_probs(reference, whole), whole)
        weights = response_ratio(model, now - then)
        one: Any = 0.0
        for i, token in enumerate(whole):
            one += policy_term(model, weights[i], advantages[id(token)], now[i])
            one += 0.1 * (rows[i].exp() * rows[i]).sum()
            if model.kl_in == "loss":
                estimate = model.kl_coef * kl(now[i], theirs[i], model.kl_estimator)
                one += estimate * ((now[i] - then[i]).exp() if model.kl_correction else 1.0)
        divisors = {
            "token": counted,
            "sequence": len(whole) * len(episodes),
            "constant": (model.constant_length or 1) * len(episodes),
        }
        total += one / divisors[model.aggregation]
    return total


KL: dict[str, Any] = {"kl_coef": 0.3}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{recipe: (GRPO, {"recipe": recipe}) for recipe in RECIPES},
    "batch, batch, soft": (GRPO, {"baseline": "batch", "scale": "batch", "clip": "soft"}),
    "leave one out, soft, k1": (
        GRPO,
        {"baseline": "leave_one_out", "clip": "soft", "scale": "none", **KL, "kl_estimator": "k1"},
    ),
    "by turn": (GRPO, {"by_turn": True, "scale": "group"}),
    "by turn, leave one out": (
        GRPO,
        {"by_turn": True, "baseline": "leave_one_out", "scale": "none", "kl_coef": 0.0},
    ),
    "product, corrected": (
        GRPO,
        {"ratio_level": "product", "kl_correction": True, "aggregation": "token", **KL},
    ),
    "KL in the reward": (GRPO, {"kl_in": "reward", **KL}),
    "rloo": (RLOO, {}),
    "rloo, KL inside": (RLOO, KL),
    "rloo, KL after": (RLOO, {**KL, "kl_in": "advantage"}),
    "reinforce++": (ReinforcePlusPlus, KL),
    "reinforce++, group": (ReinforcePlusPlus, {**KL, "baseline": "group"}),
}


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
@pytest.mark.parametrize("case", CASES)
def test_advantages_and_gradients_are_those_of_the_definitions(case: str, kind: str) -> None:
    cls, given = CASES[case]
    # Wide enough for some ratios to be clipped and some not.
    kwargs: dict[str, Any] = {"clip_range": 0.1, "ent_coef": 0.1, "dynamic_sampling": 0, **given}
    if case in ("gspo", "dapo", "cispo"):
        kwargs["clip_range_high"] = 0.05 if case == "gspo" else 1.02 if case == "cispo" else 0.15
    kwargs["overlong_margin"] = 0.0
    if cls is not GRPO:
        kwargs = {
            k: v for k, v in kwargs.items() if k not in ("dynamic_sampling", "overlong_margin")
        }
    model = make(cls, kind, micro_batch_size=9, **kwargs)
    reference = None
    if model.kl_coef:
        model.set_reference()
        reference = Critic(model.policy.backbone.model, FEW, 0.7)
    shake(model.policy)
    notes = Notes()
    collect(model, notes)
    old = Critic(model.policy.backbone.model, FEW, 0.7)
    episodes = notes.episodes()
    assert len(episodes) == SLOTS * EPISODES
    if kind == "several turns":
        assert len({len(turns) for turns in episodes.values()}) > 1
    tokens = [token for turns in episodes.values() for turn in turns for token in turn]
    kls = dict.fromkeys(map(id, tokens), 0.0)
    if reference is not None:
        for turns in episodes.values():
            whole = joined(turns)
            kls.update(kl_of(whole, old, reference, model.kl_estimator))
    expected = advantages_by_definition(episodes, kls, model)
    buffer = model.rollout_buffer
    for token in tokens:
        found = buffer.advantages[token.step, token.slot]
        assert found == pytest.approx(expected[id(token)], rel=2e-4, abs=2e-4)
    assert np.ptp(list(expected.values())) > 0.5

    shake(model.policy, 0.01)
    update = train(model)
    new = Critic(model.policy.backbone.model, FEW, 0.7)
    clip = getattr(model, "clip", "ppo")
    loss = loss_by_definition(episodes, expected, old, new, reference, model)
    loss.backward()
    assert update.log["train/loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    if clip == "ppo":
        assert 0 < update.log["train/clip_fraction"] < 1
    (gradients,) = update.gradients
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert scale > 1e-3
    for name, parameter in new.model.named_parameters():
        ours = gradients[f"backbone.model.{name}"]
        assert (ours - parameter.grad.float()).abs().max() < 2e-4 * scale, name


def test_groups_answer_one_prompt_each() -> None:
    model = make()
    notes = Notes()
    collect(model, notes)
    first = {key: turns[0][0].context for key, turns in notes.episodes().items()}
    for (slot, number), context in first.items():
        assert context == first[slot - slot % GROUP, number]
    assert len({tuple(context) for context in first.values()}) > 2
    responses = {
        tuple(token.token for token in turns[0])
        for (slot, number), turns in notes.episodes().items()
        if slot < GROUP and number == 0
    }
    assert len(responses) > 1
    members = defaultdict(set)
    for sequence in model.rollout_buffer.sequences:
        members[sequence.group].add(sequence.env)
    assert sorted(map(sorted, members.values())) == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_the_greedy_baseline_is_what_the_likeliest_response_earns() -> None:
    model = make(ReMax, group_size=1)
    before = th.get_rng_state()
    notes = Notes()
    collect(model, notes)
    buffer = model.rollout_buffer
    env: Any = gym.make("TextGen-v0", max_new_tokens=8, reward=["task", "length_penalty"]).unwrapped
    examples = {tuple(prompt.tolist()): i for i, prompt in enumerate(env.engine.prompts)}
    for turns in notes.episodes().values():
        obs, _ = env.reset(options={"example": examples[tuple(turns[0][0].context)]})
        done, greedy = False, 0.0
        while not done:
            said_next = int(model.predict(obs, deterministic=True)[0])
            obs, reward, done, _, _ = env.step(said_next)
            greedy += reward
        earned = sum(token.reward for turn in turns for token in turn)
        for token in (token for turn in turns for token in turn):
            found = buffer.advantages[token.step, token.slot]
            assert found == pytest.approx(earned - greedy, abs=1e-5)
    assert buffer.advantages.any() and not th.equal(before, th.get_rng_state())


def test_a_greedy_response_draws_nothing() -> None:
    """Two agents sample alike, whether greedy responses are played in between or not."""
    tokens = []
    for baseline in ("group", "greedy"):
        model = make(baseline=baseline, scale="none", kl_coef=0.0)
        for number in range(2):
            collect(model, fresh=number == 0)
        tokens.append(model.rollout_buffer.actions.tolist())
    assert tokens[0] == tokens[1]


def test_truncated_responses_count_in_the_mean_and_not_in_the_loss() -> None:
    plain, masked = (
        collect(make(mask_truncated=mask, scale="none", kl_coef=0.0)) for mask in (False, True)
    )
    ours, theirs = masked.rollout_buffer, plain.rollout_buffer
    assert np.array_equal(ours.advantages, theirs.advantages)
    lengths = {s.num_actions for s in theirs.sequences}
    assert 8 in lengths and len(lengths) > 2
    for sequence in theirs.sequences:
        last = int(theirs.actions[sequence.steps[-1], sequence.env])
        kept = any(s.env == sequence.env and s.episode == sequence.episode for s in ours.sequences)
        assert kept == (last == EOS)


def test_groups_without_signal_are_replaced() -> None:
    def dull(transcripts: Any) -> list[float]:
        return [float(t.response_tokens == 1) for t in transcripts]

    env = {"reward": [dull]}
    plain = make(env=env, episodes_per_slot=1, group_size=2)
    collect(plain)
    signal = groups_with_signal(plain.rollout_buffer)
    assert signal.shape == (1, 4) and not signal.all()
    model = make(env=env, episodes_per_slot=1, group_size=2, dynamic_sampling=10)
    notes = Notes()
    collect(model, notes)
    buffer = model.rollout_buffer
    assert model.num_timesteps == sum(map(len, notes.tokens.values())) > plain.num_timesteps
    earned = defaultdict(list)
    for sequence in buffer.sequences:
        earned[sequence.group].append(float(buffer.rewards[sequence.steps, sequence.env].sum()))
    assert len(earned) == 4 and all(len(set(group)) > 1 for group in earned.values())
    assert all(len(group) == 2 for group in earned.values())
    # Up to a limit: what is left then learns nothing and counts.
    model = make(env={"reward": [lambda ts: [1.0] * len(ts)]}, dynamic_sampling=2)
    collect(model)
    buffer = model.rollout_buffer
    assert len(buffer.sequences) == SLOTS * EPISODES and not buffer.advantages.any()
    assert int(buffer.episode_starts.sum()) == 3 * SLOTS * EPISODES


def test_replacing_groups_waits_for_slow_rewards() -> None:
    def judge(transcripts: Any) -> list[float]:
        return [float(t.response_tokens > 2) for t in transcripts]

    runs = []
    for slow in (False, True):
        env = {"reward": CallableReward(judge, "judge", slow=slow)}
        model = make(env=env, episodes_per_slot=1, group_size=2, dynamic_sampling=5)
        for number in range(2):
            collect(model, fresh=number == 0)
        runs.append((model.rollout_buffer.rewards.tolist(), model.num_timesteps))
    assert runs[0] == runs[1]


def test_a_long_response_costs_more_and_more() -> None:
    buffer = collect(make(kl_coef=0.0)).rollout_buffer
    before = buffer.rewards.copy()
    penalize_overlong(buffer, 8, 4)
    seen = set()
    for sequence in buffer.sequences:
        length, at = sequence.num_actions, (sequence.steps, sequence.env)
        expected = np.zeros(length)
        expected[-1] = max(0, length - 4) / 4
        np.testing.assert_allclose(before[at] - buffer.rewards[at], expected, atol=1e-6)
        seen.add(length)
    assert {4, 8} & seen and len(seen) > 3
    model = make(kl_coef=0.0, overlong_margin=0.5, scale="none")
    rewards = collect(model).rollout_buffer.rewards
    np.testing.assert_allclose(rewards, buffer.rewards, atol=1e-6)


LOSS_TYPES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"recipe": "bnpo"},
    "dr_grpo": {"recipe": "dr_grpo"},
    "dapo": {"recipe": "dapo", "overlong_margin": 0.0, "dynamic_sampling": 0},
    "cispo": {"recipe": "cispo", "clip_range_high": 1.02},
    "sapo": {"clip": "soft"},
    "gspo": {"recipe": "gspo", "clip_range_high": 0.05, "kl_coef": 0.0},
}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "rloo"])
def test_losses_are_trls(loss_type: str, corrected: bool) -> None:
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
    from trl.trainer.utils import nanstd

    loss = {"clip_range": 0.05, "kl_coef": 0.2, "kl_in": "loss", "kl_estimator": "k3"}
    given: dict[str, Any] = {**loss, "kl_correction": corrected, **LOSS_TYPES.get(loss_type, {})}
    if loss_type == "rloo":  # whose KL is in the reward there
        given = {"clip_range": 0.05, "kl_coef": 0.2, "kl_in": "reward"}
    model = make(RLOO if loss_type == "rloo" else GRPO, policy={"allowed_tokens": None}, **given)
    if model.kl_coef:
        model.set_reference()
    shake(model.policy)
    model.policy.sampling = type(model.policy.sampling)(temperature=0.7)
    collect(model)
    shake(model.policy, 0.01)
    buffer = model.rollout_buffer
    batch = buffer.batch(buffer.sequences)
    rows = len(buffer.sequences)

    def padded(values: Any, fill: float = 0.0) -> th.Tensor:
        parts = [values[batch.sequence_ids == row] for row in range(rows)]
        return th.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    mask = padded(th.ones_like(batch.old_log_probs)).long()
    # By group, as TRL has the rows; the rewards are those of the rollout.
    order = sorted(range(rows), key=lambda row: buffer.sequences[row].group)
    earned = th.tensor(
        [float(buffer.rewards[s.steps, s.env].sum()) for s in buffer.sequences], dtype=th.float64
    )
    grouped = earned[order].view(-1, GROUP)
    if loss_type == "rloo":
        wanted = grouped - (grouped.sum(1, keepdim=True) - grouped) / (GROUP - 1)
    else:
        wanted = grouped - grouped.mean(1, keepdim=True)
        if model.scale == "group":
            wanted = wanted / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    ours = padded(batch.advantages)[order, 0]
    th.testing.assert_close(ours.double(), wanted.flatten(), rtol=1e-4, atol=1e-4)

    def score(*_: Any, **__: Any) -> Any:
        new = model.policy.score(batch.sequences, batch.actions)
        return padded(new.log_probs), padded(new.entropies), None

    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, gather_for_metrics=lambda x: x
    )
    high = model.clip_range_high
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=score,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if loss_type == "gspo" else "token",
        beta=model.kl_coef,
        loss_type="grpo" if loss_type == "gspo" else loss_type,
        epsilon_low=0.05,
        epsilon_high=0.05 if high is None else high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=8,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(
            use_bias_correction_kl=corrected,
            delta=None,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
    )
    inputs = {
        "prompt_ids": th.zeros(rows, 1, dtype=th.long),
        "prompt_mask": th.ones(rows, 1, dtype=th.long),
        "completion_ids": padded(batch.actions),
        "completion_mask": mask,
        "advantages": padded(batch.advantages)[:, 0],
        "old_per_token_logps": padded(batch.old_log_probs),
        "ref_per_token_logps": padded(batch.ref_log_probs),
        "old_logps": (padded(batch.old_log_probs) * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }
    compute: Any = (RLOOTrainer if loss_type == "rloo" else GRPOTrainer)._compute_loss
    expected = compute(trainer, None, inputs)
    model.policy.zero_grad()
    expected.backward()
    theirs = {n: p.grad.clone() for n, p in model.policy.named_parameters() if p.grad is not None}
    model.policy.zero_grad()
    model.ent_coef = 0.0
    update = train(model)
    assert update.log["train/loss"] == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert scale > 1e-4
    for name, gradient in theirs.items():
        assert (update.gradients[0][name] - gradient).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (
            GRPO,
            {"group_size": 1},
            r"GRPO compares .*gym.make_vec\(..., num_envs=64, group_size=8\)",
        ),
        (RLOO, {"group_size": 1}, "RLOO compares the responses to one prompt"),
        (GRPO, {"recipe": "grrpo"}, "recipe must be one of grpo, dr_grpo"),
        (GRPO, {"by_turn": True, "baseline": "greedy"}, "leave by_turn out"),
        (GRPO, {"by_turn": True, "recipe": "gspo"}, "leave by_turn out"),
        (GRPO, {"by_turn": True, "mask_truncated": True}, "not with by_turn"),
        (GRPO, {"baseline": "batch", "scale": "group"}, "scale='group' goes with a baseline of"),
        (GRPO, {"baseline": "mean"}, "baseline must be one of group, leave_one_out, .*'mean'"),
        (GRPO, {"scale": "std"}, "scale must be one of none, group, batch, not 'std'"),
        (GRPO, {"clip": "cisspo"}, "clip must be one of ppo, cispo, soft, not 'cisspo'"),
        (GRPO, {"ratio_level": "tokens"}, "ratio_level must be one of token, sequence, product"),
        (GRPO, {"aggregation": "tokens"}, "aggregation must be one of token, sequence, constant"),
        (GRPO, {"constant_length": 8}, "for aggregation='constant', but it is 8 with 'sequence'"),
        (GRPO, {"recipe": "dr_grpo", "constant_length": 0}, "at least 1"),
        (GRPO, {"epsilon": 0.0}, "epsilon must be more than 0"),
        (GRPO, {"overlong_margin": 1.5}, "overlong_margin must be at least 0 and at most 1"),
        (GRPO, {"whiten_rewards": True}, "which whiten_rewards would change by their lengths"),
        (
            GRPO,
            {"baseline": "batch", "dynamic_sampling": 2, "group_size": 1},
            "every environment has prompts of its own",
        ),
        (ReMax, {"env": {"max_episode_steps": 3}, "group_size": 1}, "without max_episode_steps"),
        (ReMax, {"kl_coef": 0.1, "kl_in": "reward"}, "the 'advantage' or the 'loss'"),
        (ReinforcePlusPlus, {"baseline": "batch"}, "baseline must be one of none, group"),
        (GRPO, {"policy": {"critic": True}}, "GRPO has no critic"),
        (PPO, {"kl_coef": 0.1, "kl_in": "advantage"}, "PPO has a critic, which must know the KL"),
    ],
)
def test_mistakes(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(cls, **kwargs)


def test_a_rollout_that_ended_early_leaves_no_group_apart() -> None:
    model = make(kl_coef=0.0)
    calls = [0]

    def stop(_: Any) -> None:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, stop)
    engine = model.env.venv.native.engine
    assert not engine.groups_agree and len(set(engine.drawn[:GROUP])) > 1
    notes = Notes()
    collect(model, notes, fresh=False)
    prompts = {key: turns[0][0].context for key, turns in notes.episodes().items()}
    assert all(said == prompts[s - s % GROUP, k] for (s, k), said in prompts.items())


def test_groups_are_known_where_rollouts_cut_them() -> None:
    model = make_agent(env={"num_envs": SLOTS, "group_size": GROUP}, whole_episodes=True, n_steps=5)
    seen = 0
    for number in range(5):
        collect(model, fresh=number == 0)
        prompts = defaultdict(set)
        for sequence in model.rollout_buffer.sequences:
            prompts[sequence.group].add(tuple(sequence.segments[0].context.tolist()))
            seen += 1
        assert all(len(distinct) == 1 for distinct in prompts.values())
    assert (
        seen > 3 * SLOTS
        and len(
            {d - model.env.venv.native.engine.drawn[0] for d in model.env.venv.native.engine.drawn}
        )
        > 1
    )


def test_replaced_groups_are_in_no_figure_of_the_kl() -> None:
    env = {"reward": [lambda ts: [float(t.response_tokens == 1) for t in ts]]}
    model = make(
        env=env, group_size=2, dynamic_sampling=5, kl_coef=0.04, kl_target=1.0, episodes_per_slot=1
    )
    model.set_reference()
    collect(model)
    assert len(model.rollout_buffer.sequences) < int(model.rollout_buffer.episode_starts.sum())
    assert abs(model.logger.name_to_value["kl/per_token"]) < 1e-5
    assert model.kl_coef < 0.04


def test_a_batch_scale_stands_for_the_groups() -> None:
    model = make(baseline="batch", group_size=1, kl_coef=0.0)
    assert model.scale == "batch"
    assert np.abs(collect(model).rollout_buffer.advantages).max() < 5


def test_another_clip_has_another_bound() -> None:
    assert make(clip="cispo").clip_range_high == 5.0
    assert make(recipe="cispo", clip="ppo").clip_range_high is None
    assert make(recipe="cispo", clip_range_high=2.0).clip_range_high == 2.0
    assert make(recipe="dapo", clip="ppo").clip_range_high == 0.28


@pytest.mark.parametrize("cls", [GRPO, RLOO, ReinforcePlusPlus])
def test_a_rollout_teaches_several_times_by_default(cls: Any) -> None:
    env = gym.make_vec("TextGen-v0", num_envs=4, group_size=2, max_new_tokens=4)
    settings: dict[str, Any] = {"policy_kwargs": {"model": llama()}, "device": "cpu"}
    model = cls("TransformerPolicy", env, learning_rate=0.0, **settings)  # never too far
    assert (model.n_epochs, model.target_kl, model.batch_size) == (4, 0.03, 1024)
    model.learn(1)
    assert model._n_updates == 4


def test_what_bounds_ratios_is_not_for_imitation() -> None:
    env = gym.make_vec("TextGen-v0", num_envs=4, group_size=2, max_new_tokens=4)
    settings: dict[str, Any] = {"policy_kwargs": {"model": llama()}, "device": "cpu"}
    model = ExpertIteration("TransformerPolicy", env, **settings)
    assert (model.n_epochs, model.target_kl) == (1, None)


@pytest.mark.parametrize(("options", "rate"), [({}, 3e-4), ({"peft_config": {"r": 2}}, 1e-3)])
def test_remax_takes_shorter_steps(options: dict[str, Any], rate: float) -> None:
    env = gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=4)
    model = ReMax(
        "TransformerPolicy", env, policy_kwargs={"model": llama(), **options}, device="cpu"
    )
    assert model.lr_schedule(1.0) == rate


def test_none_is_the_default() -> None:
    assert make(episodes_per_slot=None).episodes_per_slot == 1


def test_a_recipe_is_for_making_and_not_for_loading(tmp_path: Any) -> None:
    make().save(tmp_path / "agent")
    with pytest.raises(ValueError, match="give these by themselves"):
        GRPO.load(tmp_path / "agent", recipe="dr_grpo")


def test_a_recipes_settings_can_be_replaced() -> None:
    model = make(recipe="dapo")
    assert (model.aggregation, model.clip_range_high, model.dynamic_sampling) == ("token", 0.28, 10)
    assert model.clip_range(1.0) == 0.2 and make(recipe="gspo").clip_range(1.0) == 3e-4
    other = make(recipe="dapo", clip_range=0.1, dynamic_sampling=0, scale="none", kl_coef=0.01)
    assert (other.clip_range(1.0), other.dynamic_sampling, other.scale) == (0.1, 0, "none")
    assert (other.kl_coef, other.kl_in, other.kl_estimator) == (0.01, "loss", "k3")
    assert make(recipe="dr_grpo").constant_length == 8
    assert all(recipe.source for recipe in RECIPES.values())


def test_the_page_has_every_recipe_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+), (\w+) \| (.*) \|$", PAGE.split("## Recipes")[1], re.M)
    assert [row[0] for row in rows] == ["recipe", *RECIPES]
    for name, baseline, scale, rest in rows[1:]:
        recipe = RECIPES[name]
        cells = [cell.strip() for cell in rest.split("|")]
        assert (baseline, scale) == (recipe.baseline, recipe.scale)
        assert cells[:2] == [recipe.ratio_level, recipe.aggregation]
        high = recipe.clip_range if recipe.clip_range_high is None else recipe.clip_range_high
        numbers = [float(number) for number in re.findall(r"[\d.]+", cells[2])]
        assert numbers == ([high] if recipe.clip == "cispo" else [recipe.clip_range, high])
        assert (cells[3] == "none") == (recipe.kl_coef == 0)
        for switch in ("overlong_margin", "dynamic_sampling", "clip"):
            value = getattr(recipe, switch)
            default = getattr(Recipe(""), switch)
            named = f'`{switch}="{value}"`' if isinstance(value, str) else f"`{switch}={value}`"
            assert (named in cells[4]) == (value != default)


def test_the_pages_code_runs() -> None:
    (code,) = [match["code"] for match in BLOCK.finditer(PAGE)]
    names: dict[str, Any] = {}
    exec(compile(code, "groups.md", "exec"), names)
    assert names["model"].num_timesteps >= 512


def test_saved_and_loaded_it_goes_on_exactly(tmp_path: Any) -> None:
    def fresh() -> Any:
        return make(recipe="dapo", learning_rate=1e-2, dynamic_sampling=1)

    model = fresh()
    model.learn(100).save(tmp_path / "agent")
    model.learn(100, reset_num_timesteps=False)
    loaded = GRPO.load(tmp_path / "agent", env=fresh().env, device="cpu")
    assert loaded.recipe == "dapo" and loaded.clip_range_high == 0.28
    loaded.learn(100, reset_num_timesteps=False)
    mine, theirs = model.policy.state_dict(), loaded.policy.state_dict()
    assert all(th.equal(mine[name], theirs[name]) for name in mine)
    assert math.isfinite(sum(float(value.sum()) for value in mine.values()))
