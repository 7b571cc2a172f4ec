"""Text tasks as Gymnasium environments; importing the package registers them."""

from textenvs.data.splits import split_examples
from textenvs.registration import register_builtin_tasks, register_task, task_ids
from textenvs.rewards import (
    CallableReward,
    LengthPenalty,
    MetricReward,
    MissingEOSPenalty,
    RepetitionPenalty,
    RewardTerm,
    TaskReward,
)
from textenvs.spaces import TokenSpace
from textenvs.task import Example, Task, Transcript, Turn

__version__ = "0.1.0"
__all__ = [
    "CallableReward",
    "Example",
    "LengthPenalty",
    "MetricReward",
    "MissingEOSPenalty",
    "RepetitionPenalty",
    "RewardTerm",
    "Task",
    "TaskReward",
    "TokenSpace",
    "Transcript",
    "Turn",
    "register_task",
    "split_examples",
    "task_ids",
]

register_builtin_tasks()
