"""Rewards: named terms that score batches of finished transcripts, and add up."""

from textenvs.rewards.metric_reward import MetricReward
from textenvs.rewards.resolving import (
    REWARD_NAMES,
    check_new_names,
    resolve_observed,
    resolve_rewards,
)
from textenvs.rewards.scoring import (
    check_example,
    check_references,
    score_transcripts,
    score_turns,
    try_terms,
)
from textenvs.rewards.terms import (
    CallableReward,
    LengthPenalty,
    MissingEOSPenalty,
    RepetitionPenalty,
    RewardTerm,
    TaskReward,
    WellFormed,
)
from textenvs.task import ScoreFunction

__all__ = [
    "REWARD_NAMES",
    "CallableReward",
    "LengthPenalty",
    "MetricReward",
    "MissingEOSPenalty",
    "RepetitionPenalty",
    "RewardTerm",
    "ScoreFunction",
    "TaskReward",
    "WellFormed",
    "check_example",
    "check_new_names",
    "check_references",
    "resolve_observed",
    "resolve_rewards",
    "score_transcripts",
    "score_turns",
    "try_terms",
]
