"""Rewards: named terms that score batches of finished transcripts, and add up."""

from textenvs.rewards.terms import (
    REWARD_NAMES,
    CallableReward,
    LengthPenalty,
    MetricReward,
    MissingEOSPenalty,
    RepetitionPenalty,
    RewardTerm,
    TaskReward,
    check_new_names,
    resolve_rewards,
    score_transcripts,
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
    "check_new_names",
    "resolve_rewards",
    "score_transcripts",
]
