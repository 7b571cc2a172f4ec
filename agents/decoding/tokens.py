"""What a model is asked about: observations, on the host, as rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

# `prompt`, `prompt_length`, `response` and `response_length` of each row, padded on the right. It
# may have an attribute `prompt_versions`, (rows,) int64: rows of the same version have the same
# prompt, and the response of the later one begins with that of the earlier one.
Observation = Mapping[str, Tokens]

# Rollouts and predictions remember keys and values apart, so that neither changes the other.
Scope = Literal["rollout", "predict"]


def lengths_of(observation: Observation) -> Tokens:
    """Return how many tokens each row has, prompt and response together."""
    return (observation["prompt_length"] + observation["response_length"])[:, 0]


def versions_of(observation: Observation) -> Tokens | None:
    """Return the versions (rows,) of the prompts, if they have any."""
    versions: Tokens | None = getattr(observation, "prompt_versions", None)
    return versions


def join_tokens(observation: Observation, rows: Any = slice(None)) -> tuple[Tokens, Tokens]:
    """Return prompt and response as one right-padded row of tokens, and the rows' lengths.

    Args:
        observation: A batch of observations of a text environment, on the host.
        rows: Which of them.

    Returns:
        (n, width) with the width of the longest row, and (n,).
    """
    prompt, response = observation["prompt"][rows], observation["response"][rows]
    prompt_length, lengths = observation["prompt_length"][rows], lengths_of(observation)[rows]
    index = np.arange(int(lengths.max()))[None, :]
    from_prompt = prompt[:, np.minimum(index[0], prompt.shape[1] - 1)]
    behind = np.clip(index - prompt_length, 0, response.shape[1] - 1)
    tokens = np.where(index < prompt_length, from_prompt, np.take_along_axis(response, behind, 1))
    return tokens, lengths


def last_tokens(observation: Observation) -> Tokens:
    """Return each row's last token, (rows,)."""
    prompt_last, response_last = (
        observation[f"{key}_length"][:, 0] - 1 for key in ("prompt", "response")
    )
    rows = np.arange(len(prompt_last))
    # Where a length is 0, the index is -1 and finds something that is not used.
    from_prompt, from_response = (
        observation["prompt"][rows, prompt_last],
        observation["response"][rows, response_last],
    )
    return np.where(response_last < 0, from_prompt, from_response)


def chunks(lengths: Tokens, limit: int) -> list[npt.NDArray[np.intp]]:
    """Split rows into chunks of at most `limit` tokens, padding included, one row at least.

    Rows of like length come together, so that little is padded. If all fit into one chunk, they
    stay in their order.

    Args:
        lengths: (rows,) how many tokens each row has.
        limit: The most tokens of a chunk, counted as rows times longest row.
    """
    if len(lengths) * int(lengths.max(initial=0)) <= limit:
        return [np.arange(len(lengths))][: len(lengths)]
    order = np.argsort(-lengths, kind="stable")
    split, start = [], 0
    while start < len(order):
        stop = start + max(1, limit // int(lengths[order[start]]))
        split.append(order[start:stop])
        start = stop
    return split
