"""PPO for text by the definitions: float64, a loop over tokens, a whole forward for each of them.

It shares nothing with `agents` but the model's class. What it knows of a rollout is what the
environment said and got: observations, tokens, rewards, ends.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th


@dataclass
class Token:
    """A token that the agent said.

    Args:
        slot: The environment.
        step: Of the rollout.
        context: What the model had read.
        token: What it said.
        reward: What the environment gave for it.
        starts: Whether it is the first one of an episode.
        ends: Whether it is the last one of an episode.
        after: What would have been read next, if the episode was cut off.
    """

    slot: int
    step: int
    context: list[int]
    token: int
    reward: float
    starts: bool
    ends: bool
    after: list[int] | None = None


@dataclass
class Diary:
    """Takes down what happens in a rollout: a function for `training.collect`."""

    tokens: list[Token] = field(default_factory=list)
    steps: int = 0
    # Of each slot, what it reads when the rollout is over.
    following: list[list[int]] = field(default_factory=list)

    def __call__(self, rollout: dict[str, Any]) -> None:
        """Take down a step."""
        before = rollout["self"]._last_obs
        starts = rollout["self"]._last_episode_starts
        slots = range(len(rollout["dones"]))
        for slot in slots:
            info, ends = rollout["infos"][slot], bool(rollout["dones"][slot])
            after = None
            if ends and info.get("TimeLimit.truncated"):
                last = info["terminal_observation"]
                after = read({key: value[None] for key, value in last.items()}, 0)
            self.tokens.append(
                Token(
                    slot,
                    self.steps,
                    read(before, slot),
                    int(rollout["actions"][slot]),
                    float(rollout["rewards"][slot]),
                    bool(starts[slot]),
                    ends,
                    after,
                )
            )
        self.following = [read(rollout["new_obs"], slot) for slot in slots]
        self.steps += 1


def read(observations: dict[str, Any], row: int) -> list[int]:
    """What an observation holds: prompt and response."""
    prompt = observations["prompt"][row][: int(observations["prompt_length"][row, 0])]
    response = observations["response"][row][: int(observations["response_length"][row, 0])]
    return [int(token) for token in [*prompt, *response]]


class Critic:
    """A model in float64 with a value head: the whole context is read for each token.

    Args:
        model: Of `transformers`; copied.
        allowed: The tokens that may be said.
        temperature: What logits are divided by.
        head: The value head; copied.
        value_model: What it reads. None: the model.
    """

    def __init__(
        self,
        model: Any,
        allowed: list[int],
        temperature: float,
        head: Any = None,
        value_model: Any = None,
    ) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(True)
        self.head = None if head is None else copy.deepcopy(head).double()
        self.value_model = (
            self.model if value_model is None else copy.deepcopy(value_model).double()
        )
        self.allowed, self.temperature = allowed, temperature
        # What was read last, since most contexts are asked for both.
        self._last: tuple[Any, list[int], bool, Any] = (None, [], False, None)

    def read(self, model: Any, context: list[int]) -> Any:
        """What a model makes of a whole context."""
        last_model, last_context, gradients, output = self._last
        same = last_model is model and last_context == context
        if not same or gradients != th.is_grad_enabled():
            output = model(th.tensor([context]), output_hidden_states=True)
            self._last = (model, list(context), th.is_grad_enabled(), output)
        return output

    def log_probs(self, context: list[int]) -> Any:
        """The log-probabilities of the allowed tokens."""
        logits = self.read(self.model, context).logits[0, -1]
        return (logits[self.allowed] / self.temperature).log_softmax(-1)

    def value(self, context: list[int]) -> Any:
        """The value of a context."""
        assert self.head is not None
        output = self.read(self.value_model, context)
        return self.head(output.hidden_states[-1][0, -1])[0]


def kl(log_prob: Any, ref_log_prob: Any, estimator: str) -> Any:
    """Schulman's estimators, of a number or a tensor."""
    if estimator == "k1":
        return log_prob - ref_log_prob
    ratio = (ref_log_prob - log_prob).exp()
    return ratio - 1 - ratio.log()


@dataclass
class Settled:
    """What a rollout comes to: for each token, in the diary's order."""

    log_probs: list[float]
    ref_log_probs: list[float]
    values: list[float]
    kl: list[float]
    rewards: list[float]
    advantages: list[float]
    returns: list[float]


@th.no_grad()
def settle(
    diary: Diary,
    actor: Critic,
    reference: Critic | None,
    *,
    gamma: float,
    lam: float,
    kl_coef: float,
    estimator: str,
    kl_in_reward: bool,
    whiten: bool,
) -> Settled:
    """Rewards, advantages and returns by their definitions."""
    allowed = actor.allowed
    log_probs, ref_log_probs, values = [], [], []
    for token in diary.tokens:
        at = allowed.index(token.token)
        log_probs.append(actor.log_probs(token.context)[at])
        ref_log_probs.append(
            log_probs[-1] if reference is None else reference.log_probs(token.context)[at]
        )
        values.append(float(actor.value(token.context)))
    estimates = [
        float(kl(mine, theirs, estimator))
        for mine, theirs in zip(log_probs, ref_log_probs, strict=True)
    ]
    rewards = [token.reward for token in diary.tokens]
    if kl_in_reward:
        rewards = [r - kl_coef * k for r, k in zip(rewards, estimates, strict=True)]
    if whiten:
        mean, std = np.mean(rewards), np.std(rewards)
        rewards = [(reward - mean) / std + mean for reward in rewards]
    for i, token in enumerate(diary.tokens):
        if token.after is not None:
            rewards[i] += gamma * float(actor.value(token.after))
    advantages = [0.0] * len(rewards)
    for slot, following in enumerate(diary.following):
        own = [i for i, token in enumerate(diary.tokens) if token.slot == slot]
        after = [values[i] for i in own[1:]] + [float(actor.value(following))]
        errors = [
            rewards[i] + gamma * (0.0 if diary.tokens[i].ends else next_value) - values[i]
            for i, next_value in zip(own, after, strict=True)
        ]
        for first, i in enumerate(own):
            for later in range(first, len(own)):
                advantages[i] += (gamma * lam) ** (later - first) * errors[later]
                if diary.tokens[own[later]].ends:
                    break
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    return Settled(
        [float(value) for value in log_probs],
        [float(value) for value in ref_log_probs],
        values,
        estimates,
        rewards,
        advantages,
        returns,
    )


def losses(
    tokens: list[Token],
    old: list[dict[str, float]],
    actor: Critic,
    *,
    clip: float,
    clip_value: float | None,
    estimator: str,
) -> dict[str, Any]:
    """The means over a minibatch's tokens of what an update minimises, with their gradients.

    Args:
        tokens: The minibatch.
        old: For each of them `log_probs`, `ref_log_probs`, `values`, `advantages`, `returns`.
        actor: The policy as it is now.
        clip: The clipping of the ratio.
        clip_value: The clipping of the value, or None.
        estimator: Of the KL in the loss.
    """
    advantages = [of["advantages"] for of in old]
    mean, std = np.mean(advantages), np.std(advantages, ddof=1)
    sums: dict[str, Any] = dict.fromkeys(("policy", "value", "entropy", "kl", "clipped"), 0.0)
    for token, of in zip(tokens, old, strict=True):
        log_probs = actor.log_probs(token.context)
        log_prob = log_probs[actor.allowed.index(token.token)]
        ratio = (log_prob - of["log_probs"]).exp()
        advantage = (of["advantages"] - mean) / std
        bounded = min(max(ratio, th.tensor(1 - clip).double()), th.tensor(1 + clip).double())
        sums["policy"] -= min(ratio * advantage, bounded * advantage)
        sums["clipped"] += float(abs(ratio.item() - 1) > clip)
        value = actor.value(token.context)
        error = (of["returns"] - value) ** 2
        if clip_value is not None:
            step = min(max(value - of["values"], -clip_value), clip_value)
            error = max(error, (of["returns"] - of["values"] - step) ** 2)
        sums["value"] += error
        sums["entropy"] -= (log_probs.exp() * log_probs).sum()
        # An importance weight makes the old policy's mean that of the new one.
        sums["kl"] += ratio * kl(log_prob, of["ref_log_probs"], estimator)
    return {name: total / len(tokens) for name, total in sums.items()}
