"""A check for environments that people write themselves, beside Gymnasium's `check_env`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

KEYS = {
    "prompt": "prompt_length",
    "response": "response_length",
}


def check_text_env(env: gym.Env[Any, Any], episodes: int = 3, seed: int = 0) -> None:
    """Play a few random episodes and check the contract of a text environment.

    Args:
        env: The environment; wrappers are welcome as long as observations pass through and the
            reward stays the sum of its terms.
        episodes: How many episodes to play, of which the first ends its turns with EOS at once.
        seed: The seed for the environment and the random agent.

    Raises:
        ValueError: At the first violation, saying what was expected and what came.
    """
    _check_spaces(env)
    space: Any = env.unwrapped.action_space
    rng = np.random.default_rng(seed)
    for episode in range(episodes):
        observation, info = env.reset(seed=seed if episode == 0 else None)
        _expect("transcript" not in info, "reset must not report a transcript")
        _check_observation(env, observation)
        _expect(observation["response_length"][0] == 0, "a response must start empty")
        done = False
        while not done:
            before = observation
            stop = episode == 0 or rng.random() < 0.05
            action = space.eos_token_id if stop else int(rng.integers(space.n))
            observation, reward, terminated, truncated, info = env.step(action)
            _check_observation(env, observation)
            done = terminated or truncated
            _check_step(env, before, action, observation, float(reward), terminated, info)
            if "transcript" in info and info["transcript"].truncated:
                _expect(truncated, "a conversation that no longer fits must truncate its episode")
    _check_determinism(env, seed)


def _check_spaces(env: gym.Env[Any, Any]) -> None:
    space = env.observation_space
    names = {*KEYS, *KEYS.values()}
    _expect(
        isinstance(space, spaces.Dict) and set(space) == names,
        f"the observation space must be a Dict of {sorted(names)}, but it is {space}",
    )
    action_space: Any = env.unwrapped.action_space
    _expect(
        isinstance(action_space, spaces.Discrete) and hasattr(action_space, "eos_token_id"),
        f"the action space must be a textenvs.TokenSpace, but it is {action_space}",
    )


def _check_observation(env: gym.Env[Any, Any], observation: Any) -> None:
    boxes: Any = env.observation_space
    for key, box in boxes.items():
        _expect(
            key in observation and box.contains(observation[key]),
            f"{key} is {observation.get(key)}, which is not in the observation space's {box}",
        )
    space: Any = env.unwrapped.action_space
    for key, length_key in KEYS.items():
        padding = observation[key][int(observation[length_key][0]) :]
        _expect(
            bool((padding == space.pad_token_id).all()),
            f"{key} must be padded with the pad id {space.pad_token_id} behind {length_key}, "
            f"but holds {padding[:8]}",
        )


def _check_step(
    env: gym.Env[Any, Any],
    before: Any,
    action: int,
    after: Any,
    reward: float,
    terminated: bool,
    info: dict[str, Any],
) -> None:
    space: Any = env.unwrapped.action_space
    length = int(before["response_length"][0])
    budget = before["response"].shape[0]
    # Within the budget, a text may have ended the turn.
    stopped = getattr(info.get("transcript"), "stopped", False)
    turn_ended = action in space.stop_token_ids or length + 1 == budget or stopped
    _expect(
        ("transcript" in info) == turn_ended,
        f"info must have a transcript exactly when a turn ended (EOS, or {budget} tokens), but "
        f"after action {action} at length {length} it has {sorted(info)}",
    )
    if not turn_ended:
        _expect(reward == 0, f"the reward within a turn must be 0, but it is {reward}")
        _expect(not terminated, "an episode must not terminate within a turn")
        _expect(
            int(after["response_length"][0]) == length + 1
            and int(after["response"][length]) == action
            and np.array_equal(after["prompt"], before["prompt"]),
            "a token must be appended to the response and leave the prompt alone",
        )
        return
    terms = info["reward_terms"]
    _expect(
        bool(np.isclose(sum(terms.values()), reward)),
        f"the reward terms {terms} must add up to the reward {reward}",
    )
    transcript = info["transcript"]
    _expect(
        transcript.final == (terminated or transcript.truncated),
        f"the transcript's final={transcript.final} and truncated={transcript.truncated} must say "
        f"whether the episode terminated ({terminated})",
    )
    if not transcript.final:
        _check_growth(before, action, after, length)


def _check_growth(before: Any, action: int, after: Any, length: int) -> None:
    """Check that a conversation grows by the very tokens that were emitted."""
    size = int(before["prompt_length"][0])
    emitted = [*before["prompt"][:size], *before["response"][:length], action]
    _expect(
        np.array_equal(after["prompt"][: len(emitted)], emitted)
        and int(after["prompt_length"][0]) >= len(emitted)
        and int(after["response_length"][0]) == 0,
        "the next prompt must start with the prompt and the response, token by token",
    )


def _check_determinism(env: gym.Env[Any, Any], seed: int) -> None:
    first, _ = env.reset(seed=seed)
    second, _ = env.reset(seed=seed)
    _expect(
        all(np.array_equal(first[key], second[key]) for key in first),
        "reset(seed) must start the same episode each time",
    )
    first, _ = env.reset(seed=seed, options={"example": 0})
    second, _ = env.reset(seed=seed + 1, options={"example": 0})
    _expect(
        all(np.array_equal(first[key], second[key]) for key in first),
        "reset(options={'example': 0}) must start on that example, whatever the seed",
    )


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"Not a text environment: {message}.")
