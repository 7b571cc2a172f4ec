"""What a `reward` argument stands for: names, functions, metrics and weights become terms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from textenvs.importing import load_object
from textenvs.rewards import metrics
from textenvs.rewards.metric_reward import MetricReward
from textenvs.rewards.terms import (
    CallableReward,
    LengthPenalty,
    MissingEOSPenalty,
    RepetitionPenalty,
    RewardTerm,
    TaskReward,
    WellFormed,
)
from textenvs.task import Task

_NAMED: dict[str, Callable[[Task], RewardTerm]] = {
    "task": TaskReward,
    "length_penalty": lambda _: LengthPenalty(),
    "missing_eos_penalty": lambda _: MissingEOSPenalty(),
    "repetition_penalty": lambda _: RepetitionPenalty(),
    "bleu": lambda _: CallableReward(metrics.bleu),
    "chrf": lambda _: CallableReward(metrics.chrf),
    "rouge_l": lambda _: CallableReward(metrics.rouge_l),
    "exact_match": lambda _: CallableReward(metrics.exact_match),
    "sentiment": lambda _: CallableReward(metrics.sentiment),
    "well_formed": WellFormed,
}
REWARD_NAMES = tuple(_NAMED)
# Those that can be named with a tokenisation, as "bleu_zh": what to call, and what to make of it
# at once, so that a name that is unknown is told when the environment is made.
_TOKENIZED: dict[str, tuple[Callable[..., list[float]], Callable[[str], Any]]] = {
    "bleu": (metrics.bleu, metrics.bleu_scorer),
    "rouge_l": (metrics.rouge_l, metrics.rouge_scorer),
}


def resolve_rewards(reward: Any, task: Task) -> list[RewardTerm]:
    """Return the terms that a `reward` argument stands for.

    Args:
        reward: None (the task's own score), a name out of `REWARD_NAMES`, "package.module:name",
            a function, a term, an `evaluate` metric, or a list of these, each optionally with a
            weight: `["task", ("length_penalty", 0.1), (my_function, 0.5)]`.
        task: The task whose own score "task" means.

    Raises:
        ValueError: For an unknown name, or two terms of one name.
        TypeError: For anything else.
    """
    items = reward if isinstance(reward, list) else [reward]
    if not items:
        raise ValueError("reward must not be an empty list: leave it out for the task's own.")
    terms = [_term(item, task) for item in items]
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"Two reward terms have the same name ({', '.join(names)}): set name=.")
    return terms


def resolve_observed(observe: Any, task: Task, paid: Sequence[RewardTerm]) -> list[RewardTerm]:
    """Return the terms that are only observed: scored and reported, but no part of the reward.

    Args:
        observe: None, or what `resolve_rewards` takes.
        task: The task. If it can say whether a response is well formed, this is observed, too.
        paid: The terms of the reward.

    Raises:
        ValueError: For an unknown name, or a name that another term has.
        TypeError: For anything else.
    """
    terms = [] if observe is None or observe == [] else resolve_rewards(observe, task)
    known = [term.name for term in paid]
    check_new_names(terms, known)
    if WellFormed.is_known_to(task) and "well_formed" not in {*known, *(t.name for t in terms)}:
        terms.append(WellFormed(task))
    return terms


def _term(item: Any, task: Task) -> RewardTerm:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float)):
        term = copy.copy(_term(item[0], task))
        term.weight = float(item[1])
        return term
    if item is None:
        return TaskReward(task)
    if isinstance(item, RewardTerm):
        return item
    if isinstance(item, str):
        return _named(item, task)
    if hasattr(item, "compute"):
        return MetricReward(item)
    if isinstance(item, type) and issubclass(item, RewardTerm):
        return item()  # type: ignore[call-arg]
    if callable(item):
        return CallableReward(item)
    raise TypeError(
        "reward must be None, a name, a function, a RewardTerm, an evaluate metric, or a list of "
        f"these (optionally with weights), but it is a {type(item).__name__}."
    )


def _named(name: str, task: Task) -> RewardTerm:
    """Return the term of a name: "chrf", "bleu_zh", "package.module:function"."""
    if name in _NAMED:
        return _NAMED[name](task)
    if ":" in name:
        return _term(load_object(name), task)
    for metric, (function, scorer) in _TOKENIZED.items():
        if name.startswith(f"{metric}_"):
            tokenize = name.removeprefix(f"{metric}_")
            scorer(tokenize)
            return CallableReward(partial(function, tokenize=tokenize), name=name)
    close = get_close_matches(name, REWARD_NAMES, n=1)
    raise ValueError(
        f"Unknown reward {name!r}: expected one of {', '.join(REWARD_NAMES)}, "
        "or 'package.module:function'." + (f" Did you mean {close[0]!r}?" if close else "")
    )


def check_new_names(terms: Sequence[RewardTerm], present: Collection[str]) -> None:
    """Check that the names of added terms are not taken, so that no term hides another.

    Raises:
        ValueError: If a name is taken.
    """
    for term in terms:
        if term.name in present:
            raise ValueError(
                f"There already is a reward term {term.name!r}: give the added one another name "
                "with name=, or leave one of them out."
            )
