"""PPO for transformers on text environments, with stable-baselines3's interface."""

from agents.buffers import SequenceRolloutBuffer
from agents.callbacks import CheckpointCallback
from agents.evaluation import evaluate_split
from agents.imitation import warm_start
from agents.policies import TransformerPolicy
from agents.ppo import PPO
from agents.vec_env import GymnasiumVecEnv

__all__ = [
    "PPO",
    "CheckpointCallback",
    "GymnasiumVecEnv",
    "SequenceRolloutBuffer",
    "TransformerPolicy",
    "evaluate_split",
    "warm_start",
]
