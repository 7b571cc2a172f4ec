"""Rewards: named terms that score batches of finished transcripts, and add up."""

from textenvs.rewards.terms import (
    REWARD_NAMES,
    CallableReward,
    LengthPenalty,
    MetricReward,
    MissingEOSPenalty,
    RepetitionPenalty,
    RewardTerm,
    ScoreFunction,
    TaskReward,
    check_new_names,
    load_object,
    resolve_rewards,
    score_transcripts,
)

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
    "load_object",
    "resolve_rewards",
    "score_transcripts",
]
