"""Rewards: named terms that score batches of finished transcripts, and add up."""

from textenvs.rewards.metric_reward import MetricReward
from textenvs.rewards.resolving import REWARD_NAMES, check_new_names, resolve_rewards
from textenvs.rewards.scoring import score_transcripts
from textenvs.rewards.terms import (
    CallableReward,
    LengthPenalty,
    MissingEOSPenalty,
    RepetitionPenalty,
    RewardTerm,
    TaskReward,
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
