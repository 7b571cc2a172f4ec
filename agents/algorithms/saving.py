"""Saving an agent with all that its run consists of, and going on with it exactly."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import gymnasium as gym
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv
from transformers import PretrainedConfig

from agents import parallel
from agents.algorithms.arguments import for_transformers
from agents.algorithms.checks import check_finite
from agents.algorithms.resume import ResumePoint, resume_point
from agents.compat import is_quantised
from agents.decoding.weights_version import fingerprint
from agents.learning.reference import make_reference
from agents.models.backbone import Backbone
from agents.models.frozen import AdapterReference
from agents.policies.transformer import TransformerPolicy

Self = TypeVar("Self", bound="SavedExactly")

# What is not worth saving.
TRANSIENT = ("awaits_update", "rank_points", "unfinished")


class SavedExactly(OnPolicyAlgorithm):
    """The part of an algorithm that saves and loads; `TransformerAlgorithm` has the arguments.

    Attributes:
        reference: The model that the policy is kept near to, if it is one of its own.
        ref_config: What to make it of again.
        pretrained: Whether the first weights were somebody's work; None: not known yet.
        resume_point: Where the run stood that was loaded, and has not gone on yet; with several
            ranks, where each stood.
        awaits_update: Whether there are steps that no update has seen.
        frozen: The fingerprint of the weights that a LoRA adapter leaves as they are, if they can
            be loaded again from where they came from: they are not saved with the agent.
    """

    kl_coef: float
    ref_model: str | None

    def _start_state(self) -> None:
        """Set what a new agent begins with."""
        self.reference: Backbone | None = None
        self.ref_config: PretrainedConfig | str | None = None
        self.frozen: list[int] | None = None
        self.pretrained: bool | None = None
        self.resume_point: ResumePoint | list[ResumePoint | None] | None = None
        self.rank_points: list[ResumePoint | None] | None = None
        self.awaits_update = False

    @property
    def is_text(self) -> bool:
        """Whether the policy is a transformer."""
        raise NotImplementedError

    def set_reference(self) -> None:
        """Make the reference of the KL penalty."""
        raise NotImplementedError

    def keep_tokenizer(self) -> None:
        """Note the tokenizer, which is about to be saved with the agent."""
        raise NotImplementedError

    @for_transformers
    def _setup_model(self) -> None:
        loaded = self.resume_point
        super()._setup_model()
        if parallel.count() > 1:  # The first weights are the same everywhere, and nothing else is.
            self._seed_rank(self.seed)
        self.resume_point = loaded  # SB3 seeds while it loads, too.
        policy = self._text_policy()
        # A saved agent must not depend on the path that its first weights came from, unless they
        # are left as they are.
        self.policy_kwargs = {
            **self.policy_kwargs,
            **policy.saved_model(),
            "value_model": policy.saved_value_model(),
        }
        if self.pretrained is None:
            self.pretrained = policy.pretrained
        policy.pretrained = self.pretrained
        self._take_in_frozen()
        self.reference = self._saved_reference()
        if self.reference is None and self.ref_model is not None:
            self.set_reference()

    def _saved_reference(self) -> Backbone | None:
        """Return a reference for saved weights to go into, if the agent had one."""
        if self.ref_config is None:
            return None
        if self.ref_config == AdapterReference.CONFIG:
            return make_reference(self._text_policy(), None)
        reference = self._text_policy().make_backbone(cast("PretrainedConfig", self.ref_config))
        return reference.to(self.policy.device).requires_grad_(False)

    def _take_in_frozen(self) -> None:
        """Note what an adapter leaves as it is, and check that it is what the agent was saved with.

        Raises:
            ValueError: If it is something else by now.
        """
        adapter = self._text_policy().backbone.adapter
        base = None if adapter is None else adapter.base
        now = None if base is None else fingerprint(self._frozen_weights().values())
        if self.frozen is not None and now != self.frozen:
            raise ValueError(
                f"The agent holds an adapter of the model {base!r}, whose weights are others now: "
                "expected those that it was trained with. Put them back, or save agents by "
                "policy.save_pretrained(..., merge=True), which keeps all weights."
            )
        self.frozen = now

    def _frozen_weights(self) -> dict[str, th.Tensor]:
        """Return the policy's weights that are not trained, by their names in its state dict.

        Those that are quantised are several tensors: theirs is what is no parameter nor buffer.
        """
        policy = self._text_policy()
        named = dict(policy.named_parameters(remove_duplicate=False))
        frozen = {
            name: weight.detach() for name, weight in named.items() if not weight.requires_grad
        }
        if is_quantised(policy.backbone):
            known = {*named, *dict(policy.named_buffers(remove_duplicate=False))}
            state = policy.state_dict()
            frozen.update({name: state[name] for name in state.keys() - known})
        return frozen

    @for_transformers
    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return parameters, as in SB3, but those that can be loaded again; see `frozen`."""
        params = super().get_parameters()
        if self.frozen is not None:
            weights = self._frozen_weights()
            if fingerprint(weights.values()) == self.frozen:
                trained = {k: v for k, v in params["policy"].items() if k not in weights}
                params["policy"] = trained
        return params

    def gather_points(self) -> None:
        """Let every rank know where all of them stand: one that saves asks no other."""
        if parallel.count() > 1:
            self.rank_points = parallel.all_gather([resume_point(self)])

    def share_weights(self) -> None:
        """Give every rank the main one's weights, and let that one alone write logs."""
        policy = self._text_policy()
        parallel.broadcast(policy, *([] if self.reference is None else [self.reference]))
        policy.clear_cache()
        if not parallel.is_main():
            self.set_logger(Logger(None, []))

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed every generator, as in SB3; a loaded agent then goes on with a new episode.

        Several ranks sample with `seed` + rank, and no two of their environments share a seed.
        """
        super().set_random_seed(seed)
        if seed is not None:
            self.resume_point = None
            if hasattr(self, "policy") and parallel.count() > 1:
                self._seed_rank(seed)

    def _seed_rank(self, seed: int | None) -> None:
        """Let this rank draw other random numbers than the other ones."""
        rank = parallel.rank()
        if seed is None:  # The script itself may have seeded torch.
            th.manual_seed((th.initial_seed() + rank) % 2**63)
            return
        super().set_random_seed(seed + rank)
        if self.env is not None:
            self.env.seed(seed + rank * self.n_envs)

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save as SB3 does, for text together with where the run stands.

        After `load(path, env=...)` into environments made alike,
        `learn(..., reset_num_timesteps=False)` goes on as if it had never ended: in the middle of
        the episodes and with the same random numbers. That is exact for what is saved between
        rollouts, by `agents.CheckpointCallback` or after `learn`; what is saved during one starts
        with new episodes, as in SB3. Of several ranks the main one writes, unless `path` is an
        open file.

        Raises:
            Diverged: If weights of a transformer are not finite; what was saved there before stays.
        """
        if not parallel.is_main() and not isinstance(path, io.BufferedIOBase):
            return
        if self.is_text:
            check_finite(self)
            self.keep_tokenizer()
        loaded = self.resume_point  # and not yet gone on from
        if self.is_text and loaded is None:
            self.resume_point = resume_point(self)
            if self.resume_point is not None and parallel.count() > 1:
                self.resume_point = self.rank_points
        try:
            super().save(path, exclude, include)
        finally:
            self.resume_point = loaded

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | gym.vector.VectorEnv[Any, Any, Any] | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load as SB3 does; keywords replace what was saved.

        With another `seed` the agent starts new episodes; another `ref_model`, or `kl_coef=0`,
        ends the saved reference.
        """
        if kwargs.get("kl_coef") == 0:
            kwargs.setdefault("ref_model", None)
        model = super().load(
            path,
            cast("GymEnv | None", env),
            device,
            custom_objects,
            print_system_info,
            force_reset,
            **kwargs,
        )
        if "seed" in kwargs:
            model.resume_point = None
        if model.reference is not None and ("ref_model" in kwargs or not model.kl_coef):
            model.reference = model.ref_config = None
            if model.ref_model is not None:
                model.set_reference()
        return model

    @for_transformers
    def set_parameters(
        self,
        load_path_or_dict: Any,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Load parameters, as in SB3; those of a reference only if there is or will be one."""
        params = load_path_or_dict
        if not isinstance(params, dict):
            params = load_from_zip_file(params, device=device, load_data=False)[1]
        if "reference" in params and self.reference is None:
            if self.kl_coef > 0:
                self.set_reference()
            else:
                params = {name: value for name, value in params.items() if name != "reference"}
        elif self.reference is not None and "reference" not in params:
            params = {**params, "reference": self.reference.state_dict()}
        if self.frozen is not None and is_quantised(self._text_policy().backbone):
            exact_match = False  # what is quantised is never loaded into what is
        elif self.frozen is not None and "policy" in params:
            params = {**params, "policy": {**self._frozen_weights(), **params["policy"]}}
        super().set_parameters(params, exact_match, device)

    def _excluded_save_params(self) -> list[str]:
        text_only = ["resume_point"] * (not self.is_text)
        return [*super()._excluded_save_params(), *TRANSIENT, *text_only]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return state_dicts + ["reference"] * (self.reference is not None), variables

    def _text_policy(self) -> TransformerPolicy:
        if not isinstance(self.policy, TransformerPolicy):
            raise TypeError(
                f"This needs a TransformerPolicy, but the policy is a {type(self.policy).__name__}."
            )
        return self.policy
