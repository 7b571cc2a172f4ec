"""The specification of a run: what its options are checked for, and what they become.

An option reaches the algorithm, or its policy, by having the name of an argument of theirs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, cast

import torch as th
from stable_baselines3.common.utils import LinearSchedule

from agents.algorithms.group_algorithm import GROUP_BASELINES
from agents.training.options import MINIMUMS, RunOptions
from agents.training.parsing import (
    allowed_values,
    check_keywords,
    parse_fields,
    parse_rewards,
    resolve_env_id,
    strings,
)
from agents.training.registry import (
    algorithm_class,
    algorithm_options,
    keywords,
    policy_options,
)

Spec = TypeVar("Spec", bound="RunSpec")

# What a nat of KL costs where neither the user nor a recipe says.
KL_COEF = 0.05
# What an option was where nothing was given, and is now left to the algorithm: runs from before
# have it for algorithms that have no such option.
FORMER_DEFAULTS = {"n_epochs": 4, "clip_range": 0.2}
# How many episodes answer one prompt where they are compared.
GROUP_SIZE = 8

# Options that fall to 0 linearly.
RATES = {"learning_rate", "vf_learning_rate"}
# Options that may be a file or a folder here, and must be found from anywhere later.
PATHS = (
    *("dataset", "eval_dataset", "model", "tokenizer", "value_model", "ref_model"),
    "chat_template",
)


@dataclass(frozen=True)
class RunSpec(RunOptions):
    """Everything that a run is made from; it checks itself when it is made.

    `RunSpec("TextGen-v0", timesteps=50_000, seed=1)` in Python; the command line's options are its
    fields, too. Each is described in `RunOptions`.

    Raises:
        TypeError: For options that there are not.
        ValueError: For options that make no sense, by themselves or together.
    """

    # What may be given anew when a run goes on: it does not change what is learned.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *("device", "checkpoint_freq", "trace_episodes", "report_to"),
    )

    def __new__(cls, *args: Any, **options: Any) -> RunSpec:
        """Refuse an option that there is not, and name the nearest."""
        check_keywords(options, [field.name for field in fields(cls)], cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        self.check()

    def check(self) -> None:
        """Refuse, before anything long begins, what would fail in the middle of it.

        Raises:
            ValueError: It names the option; see `spell`.
        """
        if not self.env:
            raise ValueError("A run needs an environment, such as TextGen-v0.")
        for name, least in MINIMUMS.items():
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise ValueError(f"{self.spell(name)} must be at least {least}, but it is {value}.")
        for name, allowed in allowed_values(cast("Any", type(self))).items():
            given = getattr(self, name)
            several = isinstance(given, (tuple, list))
            for value in given if several else [] if given is None else [given]:
                if value not in allowed:
                    raise ValueError(
                        f"{self.spell(name)} must be one of {', '.join(allowed)}, "
                        f"but it is {value!r}."
                    )
        try:
            th.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:  # Whether it is there is asked where the run starts.
            raise ValueError(
                f"{self.spell('device')} must be auto, cpu, cuda, ..., but it is {self.device!r}."
            ) from error
        self._check_together()
        self.env_kwargs()
        self.algorithm_kwargs()

    def _check_together(self) -> None:
        """Refuse options that do not go with each other."""
        if self.eval_dataset is not None and self.dataset is None:
            raise ValueError(f"{self.spell('eval_dataset')} needs {self.spell('dataset')}.")
        if self.num_envs % self.resolved_group_size:
            raise ValueError(
                f"{self.spell('num_envs')} must be a multiple of {self.spell('group_size')}="
                f"{self.resolved_group_size}, but it is {self.num_envs}."
            )
        if self.keep_best == 0 and self.threshold is None:
            raise ValueError(f"{self.spell('keep_best')}=0 needs {self.spell('threshold')}.")
        if self.patience is not None and not self.eval_freq:
            raise ValueError(f"{self.spell('patience')} needs {self.spell('eval_freq')}.")

    def spell(self, name: str) -> str:
        """Return an option's name as who gave it knows it."""
        return name

    @property
    def env_id(self) -> str:
        """The environment's registered id; see `resolve_env_id`."""
        return resolve_env_id(self.env)

    @property
    def own_reward(self) -> bool:
        """Whether the reward is the task's own."""
        return not self.reward

    @property
    def algorithm(self) -> type[Any]:
        """The algorithm's class.

        Raises:
            ValueError: If there is none of this name.
        """
        return algorithm_class(self.algo, self.spell("algo"))

    @property
    def resolved_group_size(self) -> int:
        """How many slots answer one prompt."""
        if self.group_size is not None:
            return self.group_size
        if self.keep_best == 0:
            return 1
        baseline = self.baseline or getattr(self.algorithm, "baseline", None)
        return GROUP_SIZE if baseline in GROUP_BASELINES else 1

    def env_kwargs(self, held_out: bool = False) -> dict[str, Any]:
        """Return what `gym.make` and `gym.make_vec` take, of what is trained on or held out."""
        if self.dataset is None:
            split = "test" if held_out else "train"
        elif self.eval_dataset is not None:
            split = "train"
        else:
            split = "shuffled(train)[90%:]" if held_out else "shuffled(train)[:90%]"
        given: dict[str, Any] = {
            "template": self.template,
            "system_prompt": self.system_prompt,
            "choices": tuple(strings(self.choices, self.spell("choices"))),
            "observe": list(strings(self.observe, self.spell("observe"))),
            "stop": list(strings(self.stop, self.spell("stop"))),
        }
        if held_out:
            split = self.eval_split or split
        else:
            given["group_size"] = self.resolved_group_size if self.resolved_group_size > 1 else None
            given["sampling"] = self.sampling if self.sampling != "random" else None
        if self.chat_template is not None:
            switches = {"true": True, "false": False}
            given["chat_template"] = switches.get(self.chat_template, self.chat_template)
        return {
            **{name: value for name, value in given.items() if value or value is False},
            "split": split,
            "tokenizer": self.tokenizer or (None if self.model == "tiny" else self.model),
            "dataset": (self.eval_dataset if held_out else None) or self.dataset,
            "fields": parse_fields(self.fields, self.spell("fields")),
            "reward": parse_rewards(self.reward, self.spell("reward")),
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_new_tokens": self.max_new_tokens,
            "truncate_prompt": self.truncate_prompt,
        }

    def algorithm_kwargs(self) -> dict[str, Any]:
        """Return what the algorithm's class takes besides policy and environment.

        Options that it does not have are left out.

        Raises:
            ValueError: If one of them was given.
        """
        default = {field.name: field.default for field in fields(self)}
        accepted, known = set(keywords(self.algorithm)), algorithm_options()
        missing = [name for name in default if name in known - accepted]
        given = [self.spell(name) for name in missing if getattr(self, name) != default[name]]
        if given:
            raise ValueError(
                f"The algorithm {self.algo!r} has no {', '.join(given)}: leave it out, or choose "
                f"another {self.spell('algo')}."
            )
        # What is None is left to the algorithm.
        options = {name: getattr(self, name) for name in default if name in known & accepted}
        if self.kl_coef is None and "kl_coef" in accepted and "recipe" not in accepted:
            options["kl_coef"] = KL_COEF
        options = {name: value for name, value in options.items() if value is not None}
        for name in RATES & options.keys():
            options[name] = LinearSchedule(options[name], 0.0, 1.0)
        if not self.whole_episodes:  # An algorithm may want them whole by itself.
            options.pop("whole_episodes", None)
        of_policy = policy_options()
        policy_kwargs = {name: getattr(self, name) for name in default if name in of_policy}
        policy_kwargs["peft_config"] = {"r": self.lora_rank} if self.lora_rank else None
        if self.trust_remote_code:
            policy_kwargs["model_init_kwargs"] = {"trust_remote_code": True}
        return {**options, "policy_kwargs": policy_kwargs}

    def warm_start_kwargs(self) -> dict[str, Any]:
        """Return what `agents.warm_start` takes besides the model."""
        return {
            "passes": self.warm_start,
            "learning_rate": self.warm_start_learning_rate,
            "batch_size": self.warm_start_batch_size,
            "seed": self.seed,
        }

    def to_config(self) -> dict[str, Any]:
        """Return plain data, for a run's config.json; files and folders by their whole paths."""
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        for name in PATHS:
            value: Any = config.get(name)
            if value not in (None, "tiny", "copy") and os.path.exists(value):
                config[name] = os.path.abspath(value)
        # JSON has no such number: "inf".
        endless = (k for k, v in config.items() if isinstance(v, float) and math.isinf(v))
        return {**config, **{name: str(config[name]) for name in endless}}

    @classmethod
    def from_config(cls: type[Spec], config: Mapping[str, Any]) -> Spec:
        """Return the specification in a config.json; other keys are let be, lacking ones filled."""
        algo = config.get("algo", cls.algo)
        accepted = set(keywords(algorithm_class(algo)))
        config = {
            name: value
            for name, value in config.items()
            if name in accepted or value != FORMER_DEFAULTS.get(name, ...)
        }
        values: Any = {
            field.name: tuple(value) if isinstance(value, list) else value
            for field in fields(cls)
            for value in [config.get(field.name, field.default)]
        }
        endless = {field.name for field in fields(cls) if "float" in str(field.type)}
        endless &= {name for name, value in values.items() if value in ("inf", "-inf")}
        return cls(**{**values, **{name: float(values[name]) for name in endless}})

    def check_resumes(self, saved: RunSpec, folder: object) -> None:
        """Refuse what is not the specification of the run that is to go on.

        Args:
            saved: The run's own.
            folder: The run's, for the message.

        Raises:
            ValueError: If more differs than may change.
        """
        own, given = saved.to_config(), self.to_config()
        different = [
            name for name in own if name not in self.MAY_CHANGE and own[name] != given[name]
        ]
        if different:
            raise ValueError(
                f"The run in {folder} goes on with its own options, {_listed(own, different)}, but "
                f"was given {_listed(given, different)}: leave them out, or start a new run. Only "
                f"{', '.join(self.MAY_CHANGE)} may change."
            )


def evaluation_spec(spec: Spec, env: str | None, options: Mapping[str, Any]) -> Spec:
    """Return a specification whose held-out environment is another one.

    Args:
        spec: The specification.
        env: The environment. None: its own.
        options: Of `DataOptions`, what is not as in `spec`. A dataset is held out as a whole.
    """
    changes = {name: value for name, value in options.items() if value not in (None, ())}
    if "dataset" in changes:
        changes["eval_dataset"] = changes["dataset"]
    return replace(spec, env=env or spec.env, **changes)


def _listed(options: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={options[name]!r}" for name in names)
