"""Backbones whose caches are compared with each row computed alone, for the tests here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th

from agents.models.causal import CausalBackbone
from tests.agents.helpers import CONFIGS, VOCAB, ragged

Rows = list[list[int]]


def made(name: str, **options: Any) -> CausalBackbone:
    with th.random.fork_rng():
        th.manual_seed(0)
        return CausalBackbone(CONFIGS[name](), VOCAB, 256, **options)


class Counter:
    """Counts the tokens that a backbone's prefix cache lets it read."""

    def __init__(self, backbone: CausalBackbone) -> None:
        self.tokens = 0
        self._trunk = backbone.decoder.trunk
        backbone.decoder.trunk = self  # type: ignore[method-assign,assignment]

    def __call__(self, tokens: th.Tensor, *others: Any) -> th.Tensor:
        self.tokens += tokens.numel()
        return self._trunk(tokens, *others)


def check(backbone: CausalBackbone, rows: Rows) -> None:
    """The cache must not show in the answer; each row alone, unpadded, is what is true."""
    answer = backbone.next_hidden(ragged(rows))
    for row, hidden in zip(rows, answer, strict=True):
        expected = backbone.trunk(input_ids=th.tensor([row]), use_cache=False)[0, -1]
        assert (hidden - expected).abs().max() <= 1e-5


def tokens(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.integers(1, 50, length)]


def observed(prompts: Rows, responses: Rows, width: int = 24) -> dict[str, Any]:
    """Observations as an environment gives them, padded with a token that occurs elsewhere."""
    observation: dict[str, Any] = {}
    for key, rows in (("prompt", prompts), ("response", responses)):
        observation[key] = np.array([row + [7] * (width - len(row)) for row in rows])
        observation[f"{key}_length"] = np.array([[len(row)] for row in rows])
    return observation


def check_observed(backbone: CausalBackbone, prompts: Rows, responses: Rows) -> None:
    answer = backbone.next_hidden(observed(prompts, responses))
    for prompt, response, hidden in zip(prompts, responses, answer, strict=True):
        row = th.tensor([[*prompt, *response]])
        expected = backbone.trunk(input_ids=row, use_cache=False)[0, -1]
        assert (hidden - expected).abs().max() <= 1e-5


class Versioned(dict[str, Any]):
    """Observations whose prompts have versions."""

    def __init__(self, observation: dict[str, Any], versions: list[int]) -> None:
        super().__init__(observation)
        self.prompt_versions = np.array(versions)
