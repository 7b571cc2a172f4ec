"""The live state of an engine's slots: observations, conversations, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from textenvs.envs.observations import Observation, new_versions
from textenvs.task import Turn
from textenvs.text.codec import TokenIds


class Slots:
    """What N slots hold; the engine decides when it changes.

    Args:
        num_envs: The number of slots.
        space: The observation space of one slot.
        pad_token_id: The token behind prompts and responses.

    Attributes:
        observations: The live arrays, (num_envs, ...), which change in place.
        turns: Each slot's conversation so far.
        examples: The index of the example that each slot's episode is about; -1 before the first.
        drawn: How many examples each slot has drawn since it was seeded.
        prompt_versions: A number for each slot, (num_envs,) int64, unique in this process, which
            becomes larger whenever the slot's prompt is set.
    """

    def __init__(self, num_envs: int, space: spaces.Dict, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id
        self.observations: Observation = {
            key: np.full(
                (num_envs, *(box.shape or ())),
                0 if key.endswith("length") else pad_token_id,
                dtype=np.int64,
            )
            for key, box in space.items()
        }
        self.turns: list[tuple[Turn, ...]] = [()] * num_envs
        self.examples = [-1] * num_envs
        self.drawn = [0] * num_envs
        self.prompt_versions = new_versions(num_envs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy and its original may be given different tokens, so they must not share a version.
        vars(self).update(state)
        self.prompt_versions = new_versions(len(self))

    def __len__(self) -> int:
        return len(self.turns)

    # Views are made when they are asked for: a pickle would make a stored view an array of its own.
    @property
    def response_lengths(self) -> TokenIds:
        """A view of the lengths of the responses, (num_envs,)."""
        return self.observations["response_length"][:, 0]

    def prompt(self, slot: int) -> TokenIds:
        """Return a view of a slot's prompt, without padding."""
        return self.observations["prompt"][slot, : self.observations["prompt_length"][slot, 0]]

    def response(self, slot: int) -> TokenIds:
        """Return a view of a slot's response, without padding."""
        return self.observations["response"][slot, : self.response_lengths[slot]]

    def set_prompt(self, slot: int, tokens: TokenIds) -> None:
        """Give a slot a prompt, to which nothing has been responded yet."""
        prompt = self.observations["prompt"]
        prompt[slot, : len(tokens)] = tokens
        prompt[slot, len(tokens) :] = self._pad_token_id
        self.observations["prompt_length"][slot] = len(tokens)
        self.observations["response"][slot] = self._pad_token_id
        self.observations["response_length"][slot] = 0
        self.prompt_versions[slot : slot + 1] = new_versions(1)

    def append(self, slots: npt.NDArray[np.int64], tokens: TokenIds) -> TokenIds:
        """Append one token to each of the slots' responses; return their new lengths."""
        lengths = self.response_lengths[slots]
        self.observations["response"][slots, lengths] = tokens
        lengths += 1
        self.response_lengths[slots] = lengths
        return lengths

    def extend(self, slot: int, tokens: TokenIds) -> None:
        """Append several tokens to one slot's response."""
        start = int(self.response_lengths[slot])
        self.observations["response"][slot, start : start + len(tokens)] = tokens
        self.response_lengths[slot] = start + len(tokens)

    def get_state(self) -> dict[str, Any]:
        """Return a copy as plain data."""
        return {
            "observations": {key: array.copy() for key, array in self.observations.items()},
            "turns": [[(turn.role, turn.text) for turn in turns] for turns in self.turns],
            "example": list(self.examples),
            "drawn": list(self.drawn),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned; the arrays stay the same objects."""
        for key, array in self.observations.items():
            array[...] = state["observations"][key]
        self.turns = [tuple(Turn(*turn) for turn in turns) for turns in state["turns"]]
        self.examples = list(state["example"])
        self.drawn = list(state.get("drawn", [0] * len(self)))
        self.prompt_versions = new_versions(len(self))
