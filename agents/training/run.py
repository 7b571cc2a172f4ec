"""A run: made from a specification, trained, opened again, read."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym

from agents import parallel
from agents.files import read_json, read_jsonl
from agents.models.loading import check_device
from agents.policies.sampling import Sampling
from agents.training import stages
from agents.training.evaluation import Evaluation, evaluate_split
from agents.training.folder import (
    AFTER,
    AGENT,
    BEFORE,
    CHECKPOINT,
    PROGRESS,
    SUMMARY,
    TRACES,
    check_free,
    is_finished,
    read_config,
)
from agents.training.logs import OnLog, read_metrics
from agents.training.options import DataOptions
from agents.training.parsing import check_keywords
from agents.training.spec import RunSpec, evaluation_spec
from agents.training.stages import Say


class Run:
    """A training run and the folder that it is in; make one with `create` or `open`.

        run = Run.create(RunSpec("TextGen-v0", timesteps=50_000))
        run.train()
        run.summary()["after"]["mean_reward"]

    Everything but `train` only reads the folder, also while another process trains.

    Args:
        spec: What the run does.
        folder: Where.
        is_new: Whether nothing of it has been written yet.

    Attributes:
        spec: See above.
        folder: See above.
    """

    def __init__(self, spec: RunSpec, folder: Path, is_new: bool) -> None:
        self.spec = spec
        self.folder = folder
        self._is_new = is_new

    @classmethod
    def create(cls, spec: RunSpec, folder: str | Path | None = None) -> Run:
        """Return a run that is about to start; `train` starts it and makes the folder.

        With several ranks, each has to call this; the main one's folder is that of all.

        Args:
            spec: What to do.
            folder: A new or an empty folder. None: runs/ENV/DATE-TIME.

        Raises:
            ValueError: If there is no such environment, or the folder is taken.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        own = Path("runs") / spec.env_id / stamp if folder is None else Path(folder)
        chosen = parallel.all_gather([own])[0]
        parallel.run_on_all(lambda: check_free(chosen))
        return cls(spec, chosen, is_new=True)

    @classmethod
    def open(cls, folder: str | Path, spec: RunSpec | None = None) -> Run:
        """Return a run that was started before, to read it or to go on with it.

        Args:
            folder: The run's.
            spec: Its own specification (`Run.open(folder).spec`), in which what is in
                `RunSpec.MAY_CHANGE` may be another. None: its own.

        Raises:
            ValueError: If the folder is no run's, or the specification is that of another run.
        """
        folder = Path(folder)
        config = read_config(folder)
        if spec is None:
            return cls(RunSpec.from_config(config), folder, is_new=False)
        spec.check_resumes(type(spec).from_config(config), folder)
        return cls(spec, folder, is_new=False)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its regular end, and not to an interrupt or a kill."""
        return is_finished(self.folder)

    def train(
        self,
        say: Say = lambda line: None,
        progress: bool = False,
        on_log: OnLog = lambda row: None,
    ) -> dict[str, Any]:
        """Train: from the start, or from the last checkpoint with the result of an unbroken run.

        An interrupt (Ctrl-C) ends the training early and is otherwise harmless: everything is
        written as at the regular end, the summary says `interrupted`, and `train` goes on from
        there. A finished run stays as it is.

        Args:
            say: Called with lines for the user.
            progress: Whether to show progress bars.
            on_log: Called with each row of the log, a dict: after each rollout, and after each
                evaluation (`eval/mean_reward`, ...) if there are any while training.

        Returns:
            The summary; with several ranks, on others than the main one an empty one.
        """
        listener = stages.Listener(say, on_log, progress)
        if self._is_new:
            parallel.run_on_all(lambda: check_free(self.folder))
            self._is_new = False
            with stages.no_leftovers(self.folder):
                stages.start(self.spec, self.folder, listener)
        elif not self.is_finished:
            stages.resume(self.spec, self.folder, listener)
        return self.summary() if parallel.is_main() else {}

    def evaluate(
        self,
        env: str | None = None,
        split: str | None = None,
        max_examples: int | None = None,
        deterministic: bool = False,
        seed: int = 0,
        device: str = "auto",
        samples: int = 1,
        **options: Any,
    ) -> Evaluation:
        """Play held-out examples with the agent that `load_agent` returns.

        Args:
            env: Another environment of the same vocabulary and budgets, as `RunSpec.env`. None: the
                run's own.
            split: None: what the run held out.
            max_examples: Play only so many, evenly spread over the split. None: all.
            deterministic: Whether to take the most likely token each time.
            seed: For the sampling.
            device: Where to compute.
            samples: How often each example is played.
            **options: Of `agents.training.options.DataOptions`: another `dataset` (all of it is
                played), `reward`, `observe`, ...; and `temperature`, `top_k` or `top_p`.

        Raises:
            TypeError: For other options.
            ValueError: If the agent does not fit the environment; for a device that is not there.
        """
        check_device(device)
        of_data = [field.name for field in fields(DataOptions)]
        of_sampling = [field.name for field in fields(Sampling)]
        check_keywords(options, [*of_data, *of_sampling], "Run.evaluate")
        sampling = {name: options.pop(name) for name in of_sampling if name in options}
        spec = evaluation_spec(self.spec, env, options)
        kwargs = spec.env_kwargs(held_out=True)
        resolved = read_config(self.folder)["resolved"]
        for name in ("max_prompt_tokens", "max_new_tokens"):
            kwargs[name] = options.get(name) or resolved[name]
        if env is None and resolved.get("choices"):
            kwargs.setdefault("choices", tuple(resolved["choices"]))
        if split is not None:
            kwargs["split"] = split
        held_out = gym.make(spec.env_id, **kwargs)
        model = self.load_agent(device=device)
        model.policy.sampling = replace(model.policy.sampling, **sampling)
        return evaluate_split(
            model, held_out, max_examples, deterministic, seed=seed, samples=samples
        )

    def agent_path(self) -> Path:
        """Return the file with the trained agent, or else the last checkpoint.

        Raises:
            ValueError: If there is neither yet.
        """
        for name in (AGENT, CHECKPOINT):
            if (self.folder / name).is_file():
                return self.folder / name
        raise ValueError(
            f"The run in {self.folder} has no agent and no checkpoint yet: "
            f"go on with it by textenvs train --resume {self.folder} (in Python: Run.train)."
        )

    def load_agent(self, env: Any = None, device: str = "auto") -> Any:
        """Return the agent, of the class that `spec.algo` names.

        Args:
            env: The environments to train on. None: the agent can only predict.
            device: Where to compute.

        Raises:
            ValueError: If there is none yet.
        """
        check_device(device)
        return self.spec.algorithm.load(self.agent_path(), env=env, device=device)

    def metrics(self) -> list[dict[str, Any]]:
        """Return progress.csv: a dict for each iteration so far, with numbers by name."""
        return read_metrics(self.folder / PROGRESS)

    def transcripts(self, when: Literal["before", "after"]) -> list[dict[str, Any]]:
        """Return what the agent said to the held-out examples before or after the training.

        Returns:
            A dict for each example; see `Evaluation.records`.

        Raises:
            ValueError: If they are not there yet.
        """
        names = {"before": BEFORE, "after": AFTER}
        if when not in names:
            raise ValueError(f"transcripts are from 'before' or 'after', not {when!r}.")
        return read_jsonl(self._existing(names[when]))

    def traces(self, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
        """Return the recorded episodes, token by token; see `agents.rollouts.traces.trace`.

        Args:
            start: Leave out rollouts that ended before so many time steps.
            stop: Leave out those that ended at so many or later. None: none of them.

        Returns:
            A dict for each; none where nothing is recorded (yet).
        """
        path = self.folder / TRACES
        return [
            record
            for record in (read_jsonl(path) if path.is_file() else [])
            if start <= record["num_timesteps"] and (stop is None or record["num_timesteps"] < stop)
        ]

    def summary(self) -> dict[str, Any]:
        """Return what came out: both evaluations, time steps, seconds, ...

        Raises:
            ValueError: If the run is not over yet.
        """
        summary: dict[str, Any] = read_json(self._existing(SUMMARY))
        return summary

    def _existing(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"The run in {self.folder} has no {name} yet: go on by Run.train.")
        return path
