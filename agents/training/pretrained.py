"""How good any model is, trained here or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.utils import get_device

from agents.models.loading import check_device
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.vec_env import engine_of
from agents.training.evaluation import Evaluation, evaluate_split
from agents.training.folder import is_run
from agents.training.run import Run
from agents.training.spec import RunSpec, evaluation_spec


def evaluate_model(
    model: str | Path,
    env: str | None = None,
    *,
    split: str | None = None,
    max_examples: int | None = None,
    deterministic: bool = False,
    seed: int = 0,
    device: str = "auto",
    samples: int = 1,
    **options: Any,
) -> Evaluation:
    """Play an environment's held-out examples with any model.

        evaluate_model("gpt2", "TextGen-v0", max_examples=100, samples=4).summary()

    Args:
        model: A run's folder (see `Run.evaluate`), a folder that `save_pretrained` wrote, or a hub
            id.
        env: A registered id, "package.module:Name-v0" or "package.module:Task". None: the run's.
        split: None: "test", or all of a `dataset`.
        max_examples: Play only so many, evenly spread over the split. None: all.
        deterministic: Whether to take the most likely token each time.
        seed: For the sampling.
        device: Where to compute.
        samples: How often each example is played.
        **options: Further options of `RunSpec`: `dataset`, `fields`, `reward`, `observe`,
            `tokenizer`, ...; for a model that is not a run's also `temperature`, `top_k`, `top_p`
            and `autocast`.

    Raises:
        TypeError: For options that there are not.
        ValueError: If there is no such model or environment, or they do not fit.
    """
    if is_run(Path(model)):
        return Run.open(model).evaluate(
            env, split, max_examples, deterministic, seed, device, samples, **options
        )
    if env is None:
        raise ValueError(
            f"{model} is no run folder (there is no config.json of a run in it), so an environment "
            "is needed to evaluate it in, such as TextGen-v0."
        )
    check_device(device)
    dataset = {name: options.pop(name) for name in ("dataset",) if name in options}
    spec = evaluation_spec(RunSpec(env, model=str(model), **options), None, dataset)
    kwargs = spec.env_kwargs(held_out=True)
    if split is not None:
        kwargs["split"] = split
    held_out = gym.make(spec.env_id, **kwargs)
    policy_kwargs = {**spec.algorithm_kwargs()["policy_kwargs"], "critic": False}
    policy = TransformerPolicy(
        held_out.observation_space, held_out.action_space, lambda _: 0.0, **policy_kwargs
    )
    policy.tokenizer = engine_of(held_out).tokenizer
    policy.to(get_device(device))
    return evaluate_split(policy, held_out, max_examples, deterministic, seed=seed, samples=samples)
