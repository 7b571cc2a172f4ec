"""Agents that train transformers on text environments, with stable-baselines3's interface."""

from agents.algorithms.a2c import A2C
from agents.algorithms.expert_iteration import ExpertIteration
from agents.algorithms.grpo import GRPO
from agents.algorithms.nlpo import NLPO
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import Reinforce
from agents.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from agents.algorithms.remax import ReMax
from agents.algorithms.rloo import RLOO
from agents.algorithms.sft import SFT
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.vec_env import GymnasiumVecEnv
from agents.training.checkpoints import CheckpointCallback
from agents.training.evaluation import evaluate_split
from agents.training.imitation import warm_start
from agents.training.pretrained import evaluate_model
from agents.training.run import Run
from agents.training.spec import RunSpec

__all__ = [
    "A2C",
    "GRPO",
    "NLPO",
    "PPO",
    "RLOO",
    "SFT",
    "CheckpointCallback",
    "ExpertIteration",
    "GymnasiumVecEnv",
    "ReMax",
    "Reinforce",
    "ReinforcePlusPlus",
    "Run",
    "RunSpec",
    "SequenceRolloutBuffer",
    "TransformerPolicy",
    "evaluate_model",
    "evaluate_split",
    "warm_start",
]
