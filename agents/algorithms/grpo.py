"""Group Relative Policy Optimization, and what has been made of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import stable_baselines3

from agents.algorithms.checks import check_choice
from agents.algorithms.group_algorithm import GROUP_BASELINES, GroupAlgorithm
from agents.algorithms.recipes import RECIPES, Clip, Recipe, RecipeName
from agents.learning.groups import Baseline, Scale
from agents.learning.kl import KLEstimator, KLPlace
from agents.learning.losses import (
    CappedPolicyLoss,
    EntropyLoss,
    LossTerm,
    RatioLevel,
    SoftPolicyLoss,
)
from agents.learning.objective import Aggregation


class GRPO(GroupAlgorithm, stable_baselines3.PPO):
    """Group Relative Policy Optimization: PPO's loss, and other responses instead of a critic.

    It learns from whole episodes, each beside others that answer the same prompt:

        GRPO("TransformerPolicy", gym.make_vec("TextGen-v0", num_envs=64, group_size=8))

    A recipe names what was published; each switch that is given replaces one of its settings. See
    `agents.algorithms.recipes` for their sources and values.

    Args:
        policy: "TransformerPolicy", or a subclass.
        env: Environments made by `gym.make_vec`, without wrappers, with a `group_size`.
        recipe: "grpo", "dr_grpo", "dapo", "bnpo", "gspo" or "cispo".
        learning_rate: A number or a function of the remaining progress. 3e-4, linear to 0; 3e-5 for
            a pretrained model, 2e-3 for an adapter.
        batch_size: Tokens to a minibatch, about, as sequences stay whole. 1024.
        n_epochs: Passes over the rollout in an update, as far as `target_kl` lets them. 4.
        target_kl: See `agents.PPO`. 0.03.
        episodes_per_slot: Whole episodes from each environment between updates. 1.
        baseline: "group", "leave_one_out", "batch", "greedy" or "none"; see
            `agents.learning.groups.GroupAdvantage`.
        scale: "none", "group" or "batch": what standard deviation advantages are divided by. With
            a baseline that is not of the group, "batch" stands for a recipe's "group".
        epsilon: What is added to it.
        by_turn: Whether the turns of a conversation are compared, and not whole conversations.
        ratio_level: "token", "sequence" (GSPO) or "product": what the ratio is of.
        aggregation: "sequence", "token" or "constant": what the loss is a mean over; see
            `agents.learning.objective.Objective`.
        constant_length: For "constant". None: the response budget.
        clip: "ppo": the smaller one of clipped and unclipped. "cispo": the policy gradient,
            weighted by the ratio up to a cap. "soft": a gate.
        clip_range: How far below 1 a ratio counts.
        clip_range_high: How far above; for "cispo" the cap itself. None: the recipe's, or as far as
            below.
        kl_coef: What a nat of KL to the reference model costs. 0: no reference model is kept.
        kl_in: "reward": the KL is part of what an episode earned. "advantage": it comes after the
            baseline, token by token. "loss": it is a loss of its own.
        kl_estimator: "k1" or "k3"; see `agents.learning.kl.estimate_kl`.
        kl_correction: Whether a KL in the loss is weighted by the ratio.
        overlong_margin: The share of the response budget before whose end a penalty begins, which
            is 1 at the budget. 0: none.
        mask_truncated: Whether responses that their budget cut are left out of the loss; what they
            earned counts in the baseline.
        dynamic_sampling: How often at most all play on, to replace groups whose episodes have all
            earned the same. 0: never.
        **kwargs: `kl_target`, `ref_model`, `ent_coef`, `max_grad_norm`, `micro_batch_size`,
            `policy_kwargs`, `seed`, `device`, `verbose`, ...

    Raises:
        ValueError: For environments without groups, or settings that make no sense together.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        recipe: RecipeName = "grpo",
        baseline: Baseline | None = None,
        scale: Scale | None = None,
        epsilon: float = 1e-4,
        by_turn: bool = False,
        ratio_level: RatioLevel | None = None,
        aggregation: Aggregation | None = None,
        constant_length: int | None = None,
        clip: Clip | None = None,
        clip_range_high: float | None = None,
        kl_coef: float | None = None,
        kl_in: KLPlace | None = None,
        kl_estimator: KLEstimator | None = None,
        kl_correction: bool | None = None,
        overlong_margin: float | None = None,
        mask_truncated: bool | None = None,
        dynamic_sampling: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if value is not None}
        check_choice("recipe", recipe, RecipeName)
        published = RECIPES[recipe]
        if clip is not None and clip != published.clip:
            # A bound above has another meaning there.
            high = RECIPES["cispo"].clip_range_high if clip == "cispo" else None
            published = replace(published, clip_range_high=high)
        if baseline not in (None, *GROUP_BASELINES) and published.scale == "group":
            published = replace(published, scale="batch")
        settings = {**vars(published), **given}
        chosen = {field.name: settings[field.name] for field in fields(Recipe)}
        check_choice("clip", chosen["clip"], Clip)
        check_choice("aggregation", chosen["aggregation"], Aggregation)
        if constant_length is not None and (
            chosen["aggregation"] != "constant" or constant_length < 1
        ):
            raise ValueError(
                "constant_length is a number of tokens, at least 1, for aggregation='constant', "
                f"but it is {constant_length} with {chosen['aggregation']!r}."
            )
        of_kl = {name: chosen[name] for name in ("kl_coef", "kl_in", "kl_estimator")}
        self.recipe: RecipeName = recipe
        self.baseline, self.scale = chosen["baseline"], chosen["scale"]
        self.epsilon, self.by_turn = epsilon, by_turn
        self.ratio_level, self.clip = chosen["ratio_level"], chosen["clip"]
        self.aggregation, self.constant_length = chosen["aggregation"], constant_length
        self.clip_range_high = chosen["clip_range_high"]
        self.kl_correction = chosen["kl_correction"]
        self.overlong_margin = chosen["overlong_margin"]
        self.mask_truncated = chosen["mask_truncated"]
        self.dynamic_sampling = chosen["dynamic_sampling"]
        super().__init__(policy, env, *args, **{**of_kl, **kwargs})

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as SB3 does; keywords replace what was saved.

        Raises:
            ValueError: For a `recipe`, which is a name of settings: give those.
        """
        if "recipe" in kwargs:
            raise ValueError(
                "A recipe says how an agent is made: to load one with other settings, give these "
                "by themselves, such as scale='none'."
            )
        return super().load(*args, **kwargs)

    def _text_defaults(self, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        defaults = super()._text_defaults(policy_kwargs)
        return {**defaults, "clip_range": RECIPES[self.recipe].clip_range}

    def losses(self) -> list[LossTerm]:
        """Return the policy's loss and the entropy's, with what is logged beside them."""
        entropy = EntropyLoss(self.ent_coef)
        if self.clip == "cispo":
            assert self.clip_range_high is not None
            return [CappedPolicyLoss(self.clip_range_high, self.ratio_level), entropy]
        if self.clip == "soft":
            return [SoftPolicyLoss(ratio_level=self.ratio_level), entropy]
        return super().losses()
