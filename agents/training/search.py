"""A search for better options: trials of Optuna, each of them runs."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from agents.files import write_json
from agents.training.configs import write_options
from agents.training.folder import is_run
from agents.training.logs import HELD_OUT, STEP
from agents.training.run import Run
from agents.training.spec import RunSpec

if TYPE_CHECKING:
    import optuna

Say = Callable[[str], None]

STUDY, BEST, FOUND = "study.db", "best.yaml", "search.json"
# How often a trial is evaluated while it runs, so that it can be given up.
EVALUATIONS = 8
# So many trials are never given up, and one is never given up at its first evaluations.
STARTUP_TRIALS, WARMUP_EVALUATIONS = 5, 2


@dataclass(frozen=True)
class Among:
    """An option that takes one of some values."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Return the value that a trial tries."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class Between:
    """An option that takes a number between two others; all orders of magnitude are as likely."""

    low: float
    high: float

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Return the value that a trial tries."""
        return trial.suggest_float(name, self.low, self.high, log=True)


_EVERY: dict[str, Among | Between] = {"learning_rate": Between(3e-5, 2e-3)}
_NEAR: dict[str, Among | Between] = {**_EVERY, "kl_coef": Between(0.005, 0.2)}
_BATCHES: dict[str, Among | Between] = {
    "batch_size": Among((256, 512, 1024, 2048)),
    "n_epochs": Among((1, 2, 4, 8)),
}
_GROUPS: dict[str, Among | Between] = {
    **_NEAR,
    **_BATCHES,
    "group_size": Among((4, 8, 16)),
    "episodes_per_slot": Among((1, 2)),
}
_CRITIC: dict[str, Among | Between] = {
    **_NEAR,
    "n_steps": Among((32, 64, 128)),
    "gae_lambda": Among((0.9, 0.95, 1.0)),
    "ent_coef": Among((0.0, 0.001, 0.01)),
}
_PPO: dict[str, Among | Between] = {**_CRITIC, **_BATCHES, "target_kl": Among((0.015, 0.03, 0.06))}
# What is searched, by algorithm; docs/comparison.md has it as a table.
SPACES: dict[str, dict[str, Among | Between]] = {
    "ppo": _PPO,
    "nlpo": {
        **_PPO,
        "top_mask": Among((0.8, 0.9, 0.95)),
        "target_update_iterations": Among((2, 4, 8)),
    },
    "a2c": _CRITIC,
    "reinforce": {**_NEAR, "n_steps": Among((32, 64, 128))},
    "grpo": {**_GROUPS, "recipe": Among(("grpo", "dr_grpo", "dapo", "gspo", "cispo"))},
    "rloo": _GROUPS,
    "reinforce++": {**_NEAR, **_BATCHES, "baseline": Among(("none", "group"))},
    "remax": {**_NEAR, "episodes_per_slot": Among((1, 2))},
    "expert_iteration": {**_GROUPS, "keep_best": Among((1, 2, 4))},
    "sft": {**_EVERY, "batch_size": Among((128, 256, 512, 1024))},
}


@dataclass(frozen=True)
class Search:
    """Trials of options for one algorithm, in one folder, in which one search runs at a time.

        Search(RunSpec("TextGen-v0", timesteps=32_768), Path("runs/tuned")).run(trials=20)

    The first trial has the options as they are. What is compared is the mean held-out reward at
    the end, on `spec.eval_split`: "validation", so that the test split stays unseen. A trial whose
    evaluations are below the median of the others at the same step is given up.

    Args:
        spec: What all trials have in common.
        folder: Where study and runs are.
        seeds: How many runs there are of each trial.
    """

    spec: RunSpec
    folder: Path
    seeds: int = 1

    def run(
        self, trials: int, workers: int = 1, threads: int = 1, say: Say = lambda line: None
    ) -> dict[str, Any]:
        """Try until there are so many trials, those of earlier calls included.

        Args:
            trials: How many.
            workers: How many at a time, in processes of their own. 0: in this process.
            threads: Of each.
            say: Called with a line for each trial.

        Returns:
            The best options: those of `SPACES` that were tried.

        Raises:
            ImportError: If Optuna is not installed.
            ValueError: If the folder holds another search, or all trials failed.
        """
        _optuna()
        self.folder.mkdir(parents=True, exist_ok=True)
        study, own = self.study(), {**self.spec.to_config(), "seeds": self.seeds}
        if not study.trials:
            study.enqueue_trial({}, user_attrs={"as_it_is": True})
            study.set_user_attr("spec", own)
        elif study.user_attrs.get("spec") != own:
            raise ValueError(
                f"The folder {self.folder} holds a search with other options: choose another one, "
                "or give the same options to go on with it."
            )
        for trial in study.trials:  # What was killed goes on where it was.
            if trial.state.name == "RUNNING":
                study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)
                attributes = {**trial.user_attrs, "goes_on": self._folder_number(trial)}
                study.enqueue_trial(trial.params, user_attrs=attributes)
        ended = sum(t.state.is_finished() and t.state.name != "FAIL" for t in study.trials)
        todo = [(self, threads)] * max(0, trials - ended)
        say(f"{ended} of {trials} trials are there already.")
        if workers and todo:
            with multiprocessing.get_context("spawn").Pool(min(workers, len(todo))) as pool:
                for line in pool.imap_unordered(_try, todo):
                    say(line)
        else:
            for line in map(_try, todo):
                say(line)
        return self.finish()

    def study(self) -> Any:
        """Return Optuna's study, which is made if there is none yet."""
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{self.folder / STUDY}",
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(
                seed=1000 * self.spec.seed + len(study.trials),
                multivariate=True,
                constant_liar=True,  # so that trials at one time differ
            )
        return study

    def finish(self) -> dict[str, Any]:
        """Write what was found, and return the best options.

        Raises:
            ValueError: If no trial has come to its end.
        """
        study = self.study()
        done = [t for t in study.trials if t.state.name == "COMPLETE"]
        if not done:
            raise ValueError(f"No trial in {self.folder} has come to its end.")
        best = study.best_trial
        first = next((t.value for t in done if t.user_attrs.get("as_it_is")), None)
        options = {"env": self.spec.env, "algo": self.spec.algo, **best.params}
        comment = [
            f"The best of {len(study.trials)} trials of {self.spec.timesteps:,} tokens:",
            f"held-out reward {best.value:.4f}"
            + ("" if first is None else f", {first:.4f} with the options as they were."),
        ]
        write_options(self.folder / BEST, options, comment)
        found = {
            "trials": [
                {
                    "number": t.number,
                    "state": t.state.name,
                    "value": t.value,
                    "as_it_is": bool(t.user_attrs.get("as_it_is")),
                    "options": t.params,
                    "evaluations": t.intermediate_values,
                }
                for t in study.trials
            ],
            "best": best.number,
            "importance": importance(study),
        }
        write_json(self.folder / FOUND, found)
        return dict(best.params)

    def try_options(self, trial: optuna.Trial, threads: int) -> float:
        """Train with a trial's options, and return the mean held-out reward at the end."""
        optuna = _optuna()
        space = {} if trial.user_attrs.get("as_it_is") else SPACES[self.spec.algo]
        options = {name: option.suggest(trial, name) for name, option in space.items()}
        th.set_num_threads(threads)
        folder = self.folder / f"trial-{self._folder_number(trial)}"
        steps = self.spec.timesteps // EVALUATIONS
        scores = []
        for i in range(self.seeds):
            spec = replace(self.spec, **options, seed=self.spec.seed + i, eval_freq=max(1, steps))
            place = folder / f"seed-{spec.seed}"
            run = Run.open(place) if is_run(place) else Run.create(spec, place)

            def watch(row: Mapping[str, Any], number: int = i) -> None:
                if number or not row.get(STEP) or row.get(HELD_OUT) is None:
                    return
                # Rollouts differ in their length, and what is compared must not.
                evaluation = round(row[STEP] / max(1, steps))
                trial.report(row[HELD_OUT], evaluation)
                if evaluation > WARMUP_EVALUATIONS and trial.should_prune():
                    raise optuna.TrialPruned

            scores.append(run.train(on_log=watch)["after"]["mean_reward"])
        return float(np.mean(scores))

    @staticmethod
    def _folder_number(trial: Any) -> int:
        """Return the number of the trial that began what a trial goes on with, or its own."""
        return int(trial.user_attrs.get("goes_on", trial.number))


def importance(study: Any) -> dict[str, float]:
    """Return how much of the differences between trials each option explains, if it can be told."""
    optuna = _optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        try:
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
        except (ValueError, RuntimeError):  # There are too few trials.
            return {}


def _try(what: tuple[Search, int]) -> str:
    """Make a trial, and return a line that says how it went."""
    search, threads = what
    lines: list[str] = []

    def tell(_: Any, trial: Any) -> None:
        value = "" if trial.value is None else f" {trial.value:.4f}"
        options = ", ".join(f"{name}={option}" for name, option in trial.params.items())
        lines.append(f"trial {trial.number}: {trial.state.name.lower()}{value} {options}")

    search.study().optimize(
        lambda trial: search.try_options(trial, threads),
        n_trials=1,
        callbacks=[tell],
        catch=(ValueError,),  # It has diverged.
    )
    return lines[0]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "A search needs Optuna: pip install 'textenvs[tune]' (or optuna>=4)."
        ) from error
    return optuna
