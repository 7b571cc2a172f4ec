"""What a policy is asked about: observations of environments, or sequences with their actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

from agents.models.backbone import Backbone, Observation
from agents.models.layout import SequenceBatch
from textenvs.spaces import TokenSpace


def as_sequences(obs: PyTorchObs | SequenceBatch) -> SequenceBatch | None:
    """Return sequences, as they are or as a buffer's samples hold them; None: they are none."""
    if isinstance(obs, SequenceBatch):
        return obs
    samples = cast("dict[str, th.Tensor]", obs)
    if "action_positions" not in samples:
        return None
    known = {field.name: samples.get(field.name) for field in fields(SequenceBatch)}
    if known["turn_starts"] is None:
        known["turn_starts"] = samples["action_positions"]
    return SequenceBatch(**cast("dict[str, Any]", known))


def action_hidden(backbone: Backbone, obs: PyTorchObs | SequenceBatch) -> th.Tensor:
    """Return the hidden states (n, hidden) from which actions were or will be chosen."""
    batch = as_sequences(obs)
    if batch is not None:
        return backbone.hidden_states(batch)
    return backbone.last_hidden(on_host(cast("dict[str, th.Tensor]", obs)))


def on_host(observations: Mapping[str, th.Tensor | npt.NDArray[Any]]) -> Observation:
    """Return observations as arrays; what is on the host already is returned as it is.

    Raises:
        ValueError: If SB3 has cut a longer prompt or response into several rows.
    """
    arrays = cast("Observation", observations)
    if any(isinstance(value, th.Tensor) for value in observations.values()):
        arrays = {k: v.cpu().numpy() for k, v in cast("dict[str, th.Tensor]", arrays).items()}
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(
            "The observation is that of an environment of other budgets than the policy's: make "
            "it with the same tokenizer, max_prompt_tokens and max_new_tokens."
        )
    return arrays


def where_asked(obs: PyTorchObs, *answers: th.Tensor) -> tuple[th.Tensor, ...]:
    """Return answers where the observations are, in one transfer for each type."""
    (asked,) = {value.device for value in cast("dict[str, th.Tensor]", obs).values()}
    return moved(asked, *answers)


def moved(asked: th.device, *answers: th.Tensor) -> tuple[th.Tensor, ...]:
    """Return tensors on a device, in one transfer for each type."""
    if all(answer.device == asked for answer in answers):
        return answers
    copies: list[th.Tensor] = list(answers)
    for dtype in {answer.dtype for answer in answers}:
        alike = [i for i, answer in enumerate(answers) if answer.dtype == dtype]
        joined = th.cat([answers[i].flatten() for i in alike]).to(asked)
        for i, part in zip(alike, joined.split([answers[i].numel() for i in alike]), strict=True):
            copies[i] = part.view(answers[i].shape)
    return tuple(copies)


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Raise a ValueError unless the spaces are those of a text environment."""
    keys = {"prompt", "prompt_length", "response", "response_length"}
    if not isinstance(observation_space, spaces.Dict) or not keys <= set(observation_space):
        raise ValueError(
            f"TransformerPolicy reads a Dict observation with {sorted(keys)}, as the environments "
            f"of textenvs give it, but the observation space is {observation_space}."
        )
    if observation_space["prompt_length"].shape != (1,):
        raise ValueError(
            "TransformerPolicy reads one observation at a time, not several stacked, but the "
            f"shape of prompt_length is {observation_space['prompt_length'].shape}, not (1,)."
        )
    if not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            f"TransformerPolicy emits tokens, so it needs a {TokenSpace.__name__} or another "
            f"Discrete action space, but it is {action_space}."
        )
