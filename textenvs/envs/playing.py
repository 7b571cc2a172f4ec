"""Playing chosen examples to the end, each exactly once: for evaluation and for demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from textenvs.envs.engine import Info, TextEngine
from textenvs.envs.observations import Observation
from textenvs.task import Example, Transcript, Turn
from textenvs.text.codec import TokenIds

# What an agent that speaks text says next: from the example and the conversation so far.
Respond = Callable[[Example, Sequence[Turn], np.random.Generator], str]


@dataclass
class Episode:
    """A finished episode.

    Args:
        example: The index of its example.
        turns: (prompt, response) of each turn, as token ids.
        transcript: The whole conversation.
        reward: The return: the sum of all rewards, undiscounted.
        reward_terms: The sum of each reward term.
        observed: The mean of each observed term over the turns that it has scored.
        observed_turns: How many they are.
        is_success: Whether it succeeded, if the task knows success.
    """

    example: int
    turns: list[tuple[TokenIds, TokenIds]] = field(default_factory=list)
    transcript: Transcript | None = None
    reward: float = 0.0
    reward_terms: dict[str, float] = field(default_factory=dict)
    observed: dict[str, float] = field(default_factory=dict)
    observed_turns: dict[str, int] = field(default_factory=dict)
    is_success: bool | None = None


class TokenAgent(Protocol):
    """Chooses the next token of each slot."""

    def __call__(self, engine: TextEngine, observations: Observation) -> npt.NDArray[np.int64]:
        """Return (num_envs,) token ids."""
        ...


class ScriptedAgent:
    """An agent that speaks text: what it says is emitted token by token.

    Args:
        respond: Says what to respond.
        seed: The seed for `respond`'s generator, one number or several.
    """

    def __init__(self, respond: Respond, seed: int | Sequence[int] = 0) -> None:
        self._respond = respond
        self._rng = np.random.default_rng(seed)
        self._pending: dict[int, TokenIds] = {}
        self._answered: dict[int, Sequence[Turn]] = {}

    def __call__(
        self,
        engine: TextEngine,
        observations: Observation,
        slots: npt.NDArray[np.intp] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Return the next token of what each slot is saying, (num_envs,).

        Args:
            engine: Whose slots.
            observations: Theirs.
            slots: Those that speak; EOS stands for the others. None: all.
        """
        actions = np.full(engine.num_envs, engine.eos_token_id, dtype=np.int64)
        lengths = observations["response_length"][:, 0]
        for slot in range(engine.num_envs) if slots is None else slots.tolist():
            length = int(lengths[slot])
            turns = engine.turns[slot]
            # The tuple is replaced with every turn, so the same object means the same turn.
            if length == 0 and self._answered.get(slot) is not turns:
                text = self._respond(engine.example(slot), turns, self._rng)
                self._pending[slot] = engine.encode_response(text, slot)
                self._answered[slot] = turns
            if length < len(self._pending[slot]):
                actions[slot] = self._pending[slot][length]
        return actions


def play(
    engine: TextEngine, agent: TokenAgent, examples: Sequence[int], seed: int = 0
) -> list[Episode]:
    """Play each of the examples once; a slot takes the next one as soon as it is free.

    Args:
        engine: Where to play; use `TextEngine.with_slots` to leave a running one alone.
        agent: Chooses the tokens.
        examples: The indices of the examples.
        seed: Each episode's generator is seeded with this and its example, so that it does not
            depend on the slot or on what else is played.

    Returns:
        The episodes, in the order of the examples.
    """
    episodes = [Episode(example) for example in examples]
    waiting = iter(episodes)
    running: dict[int, Episode] = {}
    rngs = [np.random.default_rng() for _ in range(engine.num_envs)]
    prompt_lengths = np.zeros(engine.num_envs, dtype=np.int64)

    def start(slot: int) -> None:
        """Give a free slot the next example, if there is one."""
        running.pop(slot, None)
        episode = next(waiting, None)
        # A slot without one holds any episode, for agents to read; it is not stepped.
        index = episodes[0].example if episode is None else episode.example
        rngs[slot] = np.random.default_rng([seed, index])
        engine.reset(slot, rngs[slot], index)
        prompt_lengths[slot] = engine.observations["prompt_length"][slot, 0]
        if episode is not None:
            running[slot] = episode

    for slot in range(engine.num_envs if episodes else 0):
        start(slot)
    while running:
        actions = agent(engine, engine.observations)
        _, terminated, infos = engine.step(actions, rngs, np.array(sorted(running)))
        for slot, info in infos:
            turn = _turn(engine, slot, int(prompt_lengths[slot]), info["transcript"])
            _record(running[slot], turn, info)
            prompt_lengths[slot] = engine.observations["prompt_length"][slot, 0]
            if terminated[slot]:
                start(slot)
    return episodes


def _turn(
    engine: TextEngine, slot: int, prompt_length: int, transcript: Transcript
) -> tuple[TokenIds, TokenIds]:
    """Return the prompt and the response of a turn that has just ended, of the prompt's length."""
    prompt = engine.observations["prompt"][slot]
    # If the conversation continues, the prompt has grown by the response and a reply.
    response = engine.observations["response"][slot] if transcript.final else prompt[prompt_length:]
    return prompt[:prompt_length].copy(), response[: transcript.response_tokens].copy()


def _record(episode: Episode, turn: tuple[TokenIds, TokenIds], info: Info) -> None:
    """Enter a finished turn."""
    episode.turns.append(turn)
    episode.transcript = info["transcript"]
    episode.is_success = info.get("is_success")
    for name, value in info["reward_terms"].items():
        episode.reward += value
        episode.reward_terms[name] = episode.reward_terms.get(name, 0.0) + value
    for name, value in info.get("observed", {}).items():
        count = episode.observed_turns[name] = episode.observed_turns.get(name, 0) + 1
        mean = episode.observed.get(name, 0.0)
        episode.observed[name] = mean + (value - mean) / count
