"""Published ways to learn from groups of responses, as settings of `agents.GRPO`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agents.learning.groups import Baseline, Scale
from agents.learning.kl import KLEstimator, KLPlace
from agents.learning.losses import RatioLevel
from agents.learning.objective import Aggregation

Clip = Literal["ppo", "cispo", "soft"]
RecipeName = Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo"]


@dataclass(frozen=True)
class Recipe:
    """What a method decides; see the arguments of `agents.GRPO`.

    Args:
        source: Where it was published, or whose it is.
    """

    source: str
    baseline: Baseline = "group"
    scale: Scale = "group"
    ratio_level: RatioLevel = "token"
    aggregation: Aggregation = "sequence"
    clip: Clip = "ppo"
    clip_range: float = 0.2
    clip_range_high: float | None = None
    kl_coef: float = 0.0
    kl_in: KLPlace = "loss"
    kl_estimator: KLEstimator = "k3"
    kl_correction: bool = True
    overlong_margin: float = 0.0
    mask_truncated: bool = False
    dynamic_sampling: int = 0


RECIPES: dict[RecipeName, Recipe] = {
    "grpo": Recipe(
        "Shao et al., DeepSeekMath (2024), arXiv 2402.03300", kl_coef=0.04, kl_correction=False
    ),
    "dr_grpo": Recipe(
        "Liu et al., Understanding R1-Zero-Like Training (2025), arXiv 2503.20783",
        scale="none",
        aggregation="constant",
    ),
    "dapo": Recipe(
        "Yu et al., DAPO (2025), arXiv 2503.14476",
        aggregation="token",
        clip_range_high=0.28,
        overlong_margin=0.2,
        dynamic_sampling=10,
    ),
    "bnpo": Recipe("TRL's loss_type='bnpo': a mean over tokens", aggregation="token"),
    "gspo": Recipe(
        "Zheng et al., Group Sequence Policy Optimization (2025), arXiv 2507.18071",
        ratio_level="sequence",
        clip_range=3e-4,
        clip_range_high=4e-4,
    ),
    "cispo": Recipe(
        "MiniMax, MiniMax-M1 (2025), arXiv 2506.13585; the cap of Khatri et al., ScaleRL (2025)",
        aggregation="token",
        clip="cispo",
        clip_range_high=5.0,
    ),
}
