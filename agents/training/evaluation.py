"""How good a policy is on held-out examples, each played exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch as th

from agents.rng import preserved_rng_state
from agents.rollouts.vec_env import engine_of
from textenvs.envs.engine import Observation, TextEngine
from textenvs.envs.playing import Episode, play


class Predictor(Protocol):
    """Anything with SB3's `predict`: an algorithm or a policy."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], Any]:
        """Return actions and a state."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Episodes and what they come to.

    Args:
        episodes: In the order of the examples; with several samples, each example's one after
            the other.
    """

    episodes: list[Episode]

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """Each episode's return."""
        return np.array([episode.reward for episode in self.episodes])

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(self.rewards.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of the mean return over the examples."""
        pairs = ((episode.example, episode.reward) for episode in self.episodes)
        return _standard_error(_by_example(pairs))

    @property
    def success_rate(self) -> float | None:
        """The share of successes, if the task knows success."""
        return _share([episode.is_success for episode in self.episodes])

    def best(self) -> Evaluation:
        """Return the best episode of each example, the first of equal ones: best of n."""
        best: dict[int, Episode] = {}
        for episode in self.episodes:
            if episode.example not in best or episode.reward > best[episode.example].reward:
                best[episode.example] = episode
        return Evaluation(list(best.values()))

    def summary(self) -> dict[str, Any]:
        """Return the metrics that belong into a report; see `summarize`."""
        return summarize(self.records())

    def records(self) -> list[dict[str, Any]]:
        """Return each episode as plain data, for a JSONL file."""
        return [
            {
                "example": episode.example,
                "turns": [asdict(turn) for turn in episode.transcript.turns],
                "references": list(episode.transcript.references),
                "reward": episode.reward,
                "reward_terms": episode.reward_terms,
                "observed": episode.observed,
                "is_success": episode.is_success,
                "stopped": episode.transcript.stopped,
                "response_tokens": sum(len(response) for _, response in episode.turns),
            }
            for episode in self.episodes
            if episode.transcript is not None
        ]


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics that belong into a report.

    Args:
        records: Those of an `Evaluation`, as they are or read back from a file.

    Returns:
        Among others `mean_reward`; `standard_error` over the examples, None for one example;
        `success_rate`, None where the task knows no success; with several samples `samples`,
        `best@k`, the mean of what the best of k responses earns, and `pass@k` where the task knows
        success.
    """
    rewards = np.array([record["reward"] for record in records])
    terms = sorted({name for record in records for name in record["reward_terms"]})
    by_example = _by_example((record["example"], record["reward"]) for record in records)
    error = _standard_error(by_example)
    several = len(records) // len(by_example)
    return {
        "examples": len(by_example),
        **({"samples": several} if several > 1 else {}),
        "mean_reward": float(rewards.mean()),
        "standard_error": None if math.isnan(error) else error,
        "success_rate": _share([record["is_success"] for record in records]),
        **(_at_powers(records) if several > 1 else {}),
        "reward_terms": {
            name: float(np.mean([record["reward_terms"].get(name, 0.0) for record in records]))
            for name in terms
        },
        "observed": _observed(records),
        "stopped_by_eos": float(np.mean([record["stopped"] for record in records])),
        "response_tokens": float(np.mean([record["response_tokens"] for record in records])),
        "distinct_responses": len({record["turns"][-1]["text"] for record in records})
        / len(records),
    }


def reward_text(summary: Mapping[str, Any], success: bool = True) -> str:
    """Return an evaluation's mean reward with its standard error, as text.

    Args:
        summary: See `summarize`.
        success: Whether to tell the success rate, too. The task's success says little about a
            reward that is not the task's.
    """
    rate = summary["success_rate"] if success else None
    error = summary["standard_error"]
    return (
        f"{summary['mean_reward']:.3f} "
        + ("" if error is None else f"± {error:.3f} ")
        + f"(n={summary['examples']})"
        + ("" if rate is None else f", success {rate:.0%}")
    )


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """Return what the best of k responses earns: the mean over all choices of k of the largest.

    Of successes (0 or 1) it is the chance that one of k succeeds (pass@k, Chen et al. 2021).

    Args:
        rewards: Of several responses to one prompt.
        k: At most as many.
    """
    n = len(rewards)
    ranked = enumerate(sorted(rewards))  # the i-th is the largest one of C(i, k - 1) choices
    return sum(reward * math.comb(i, k - 1) for i, reward in ranked) / math.comb(n, k)


def _at_powers(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return best@k and pass@k for k = 1, 2, 4, ..., the means over examples."""
    own: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        own.setdefault(record["example"], []).append(record)
    fewest = min(map(len, own.values()))
    kinds = {"best": "reward", "pass": "is_success"}
    if any(record["is_success"] is None for record in records):
        del kinds["pass"]
    return {
        f"{kind}@{k}": float(
            np.mean([best_at_k([r[key] for r in each], k) for each in own.values()])
        )
        for kind, key in kinds.items()
        for k in (2**i for i in range(fewest.bit_length()))
    }


def _by_example(rewards: Iterable[tuple[int, float]]) -> npt.NDArray[np.float64]:
    """Return each example's mean reward over its samples, from pairs of example and reward."""
    own: dict[int, list[float]] = {}
    for example, reward in rewards:
        own.setdefault(example, []).append(reward)
    return np.array([np.mean(several) for several in own.values()])


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    n = len(values)
    return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def _observed(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each measure that is not paid for, over the episodes that have it."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.get("observed", {}).items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: float(np.mean(own)) for name, own in sorted(values.items())}


def _share(successes: Sequence[bool | None]) -> float | None:
    known = [success for success in successes if success is not None]
    return float(np.mean(known)) if known else None


def evaluate_split(
    model: Predictor,
    env: Any,
    max_examples: int | None = None,
    deterministic: bool = False,
    num_envs: int = 64,
    seed: int = 0,
    samples: int = 1,
) -> Evaluation:
    """Play each example of an environment's split, once or several times.

    The rewards are those of the environment itself, without what wrappers add; to evaluate a
    wrapped environment there is SB3's `evaluate_policy`.

    Args:
        model: An algorithm or a policy of SB3's kind.
        env: A text environment, single or vectorised, Gymnasium's or SB3's; it is left as it is.
        max_examples: Play only so many, evenly spread over the split. At least 1; None: all.
        deterministic: Whether to take the most likely token each time.
        num_envs: How many examples to play at a time.
        seed: For the sampling of tokens and the users of dialogues; nobody else's generator is
            touched, so that evaluating a model in training changes nothing.
        samples: How often each example is played. At least 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, but it is {samples}.")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, but it is {max_examples}.")
    engine = engine_of(env)
    expected = getattr(model, "observation_space", engine.observation_space)
    if engine.observation_space != expected:
        raise ValueError(
            "The model was made for other budgets or another vocabulary than this environment's: "
            f"expected {expected}, got {engine.observation_space}. Make the environment with the "
            "same tokenizer, max_prompt_tokens and max_new_tokens."
        )
    total = len(engine.examples)
    count = total if max_examples is None else min(total, max_examples)
    examples = [int(i) for i in np.linspace(0, total - 1, count).round()]

    def agent(engine: TextEngine, observations: Observation) -> npt.NDArray[np.int64]:
        actions, _ = model.predict(observations, deterministic=deterministic)
        return np.asarray(actions, dtype=np.int64)

    with preserved_rng_state():
        th.manual_seed(seed)
        slots = engine.with_slots(min(num_envs, count))
        rounds = [play(slots, agent, examples, seed + number) for number in range(samples)]
    return Evaluation([episode for own in zip(*rounds, strict=True) for episode in own])
