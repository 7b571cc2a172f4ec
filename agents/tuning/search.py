"""A search for better options: trials of Optuna, each of them runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.files import write_json
from agents.rollouts.buffer import Diverged
from agents.training.comparison import EVALUATIONS
from agents.training.configs import write_options
from agents.training.logs import HELD_OUT, STEP
from agents.training.pool import run_all, train_to_the_end
from agents.training.spec import RunSpec
from agents.training.stages import Say
from agents.tuning.spaces import Among, space

STUDY, BEST, FOUND = "study.db", "best.yaml", "search.json"
# So many trials are never given up, and none is at its first evaluations.
STARTUP_TRIALS, WARMUP_EVALUATIONS = 5, 2
# How far what is observed may fall, where nothing is said: two errors of a share of 100 examples.
MAX_FALL = 0.05
# What a file of the best options does not say: how they were judged, and where.
NOT_SAID = {"seed", "eval_split", "eval_freq", "checkpoint_freq", "device"}


@dataclass(frozen=True)
class Search:
    """Trials of options for one algorithm, in one folder, in which one search runs at a time.

        Search(RunSpec("TextGen-v0", timesteps=32_768), Path("runs/tuned")).run(trials=20)

    The first trial has the options as they are. What is compared is the mean held-out reward at
    the end: of the task's own data on the validation split, so that the test split stays unseen; of
    a dataset on what `spec` holds out. A trial whose evaluations are below the median of the others
    at the same step is given up, and one whose reward is paid with what is observed and not paid
    for (`well_formed`) is not the best.

    Args:
        spec: What all trials have in common.
        folder: Where study and runs are.
        seeds: How many runs there are of each trial. With one the best may be what was lucky.
        max_fall: How far each observed measure may be below where training began. Infinity: it does
            not matter.
    """

    spec: RunSpec
    folder: Path
    seeds: int = 3
    max_fall: float = MAX_FALL

    def __post_init__(self) -> None:
        """Evaluate on the way, keep a checkpoint as often, and leave the test split alone."""
        steps = max(1, self.spec.timesteps // EVALUATIONS)
        split = self.spec.eval_split
        if split is None and self.spec.dataset is None:
            split = "validation"
        spec = replace(self.spec, eval_freq=steps, checkpoint_freq=steps, eval_split=split)
        object.__setattr__(self, "spec", spec)

    def run(
        self, trials: int, workers: int = 0, threads: int = 1, say: Say = lambda line: None
    ) -> dict[str, Any]:
        """Try until there are so many trials, those of earlier calls included.

        Args:
            trials: How many.
            workers: How many at a time, in processes of their own; a script that asks for some
                needs `if __name__ == "__main__":`. 0: in this process.
            threads: Of each.
            say: Called with a line for each trial.

        Returns:
            The best options: those of the `space` that were tried.

        Raises:
            ImportError: If Optuna is not installed.
            ValueError: If the folder holds another search, or no trial has come to its end.
            KeyboardInterrupt: If it was interrupted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        study = self._begin()
        ended = sum(t.state.is_finished() and t.state.name != "FAIL" for t in study.trials)
        numbers = range(len(study.trials), len(study.trials) + max(0, trials - ended))
        say(f"{ended} of {trials} trials are there already.")
        try:
            for line in run_all(_try, [(self, number) for number in numbers], workers, threads):
                say(line)
        except BaseException:
            if _complete(self.study()):
                self.finish()
            raise
        return self.finish()

    def _begin(self) -> Any:
        """Return the study, checked, with what was killed ready to go on where it was."""
        study = self.study()
        known = study.user_attrs.get("spec")
        if known is None:
            study.set_user_attr("spec", {**self.spec.to_config(), "seeds": self.seeds})
        else:
            self.spec.check_resumes(RunSpec.from_config(known), self.folder)
            if known["seeds"] != self.seeds:
                raise ValueError(
                    f"The search in {self.folder} has {known['seeds']} seeds a trial, not "
                    f"{self.seeds}: give as many, or choose another folder."
                )
        if not study.trials:
            study.enqueue_trial({}, user_attrs={"as_it_is": True})
        for trial in study.trials:
            if trial.state.name == "RUNNING":
                study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)
                attributes = {**trial.user_attrs, "goes_on": self._folder_number(trial)}
                study.enqueue_trial(trial.params, user_attrs=attributes)
        return study

    def study(self, number: int = 0) -> Any:
        """Return Optuna's study, which is made if there is none yet.

        Args:
            number: Of the trial that is to be made: what it draws depends on it.
        """
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
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
                seed=1000 * self.spec.seed + number,
                multivariate=True,
                group=True,  # the first trial has no options
                constant_liar=True,  # so that trials at one time differ
                **({} if _sets_constraints() else {"constraints_func": self._excess}),
            )
        return study

    def finish(self) -> dict[str, Any]:
        """Write what was found, and return the best options.

        Raises:
            ValueError: If no trial has come to its end.
        """
        study = self.study()
        if not _complete(study):
            raise ValueError(f"No trial in {self.folder} has come to its end.")
        best = self._best(study)
        chosen = replace(self.spec, **best.params)
        options = {
            field.name: value
            for field in fields(chosen)
            if field.name not in NOT_SAID
            and (value := getattr(chosen, field.name)) != field.default
        }
        options = {"env": chosen.env, "algo": chosen.algo, **options}
        write_options(self.folder / BEST, options, self.judgement())
        found = {
            "trials": [
                {
                    "number": t.number,
                    "state": t.state.name,
                    "value": t.value,
                    "as_it_is": bool(t.user_attrs.get("as_it_is")),
                    "fall": t.user_attrs.get("fall"),
                    "left_out": self._is_hacked(t),
                    "options": t.params,
                    "evaluations": t.intermediate_values,
                }
                for t in study.trials
            ],
            "best": best.number,
            "importance": importance(study, list(space(self.spec.algo))),
        }
        write_json(self.folder / FOUND, found)
        return dict(best.params)

    def judgement(self) -> list[str]:
        """Return, in lines, how good the best options are, beside those of the first trial."""
        study = self.study()
        own = [t.value for t in study.trials if t.user_attrs.get("as_it_is")]
        first = [value for value in own if value is not None]
        best = self._best(study)
        lines = [
            f"The best of {len(study.trials)} trials of {self.spec.timesteps:,} tokens: held-out "
            f"reward {best.value:.4f}"
            + (f", {first[0]:.4f} with the options as they were." if first else "."),
            "The best of many is flattered by chance: compare it on other seeds.",
        ]
        hacked = [t for t in _complete(study) if self._is_hacked(t)]
        if self._is_hacked(best):
            lines.append(
                "In every trial something that is observed and not paid for fell by more than "
                f"{self.max_fall:g}: read the texts."
            )
        elif hacked:
            lines.append(
                f"Left out: {len(hacked)} trials, of up to {max(t.value for t in hacked):.4f}, in "
                "which something that is observed and not paid for fell by more than "
                f"{self.max_fall:g}."
            )
        return lines

    def _best(self, study: Any) -> Any:
        """Return the best trial of those that kept what is observed, or of all if none did."""
        trials = _complete(study)
        kept = [t for t in trials if not self._is_hacked(t)]
        return max(kept or trials, key=lambda trial: trial.value)

    def _is_hacked(self, trial: Any) -> bool:
        return self._excess(trial)[0] > 0

    def _excess(self, trial: Any) -> tuple[float]:
        """Return by how much what is observed fell more than it may; of a trial given up, 0."""
        fall = trial.user_attrs.get("fall")
        return (0.0 if fall is None or math.isinf(self.max_fall) else fall - self.max_fall,)

    def try_options(self, trial: Any) -> float:
        """Train with a trial's options, and return the mean held-out reward at the end."""
        optuna = _optuna()
        tried = {} if trial.user_attrs.get("as_it_is") else space(self.spec.algo)
        options = {}
        for name, option in tried.items():
            if name == "group_size" and isinstance(option, Among):
                option = Among(tuple(v for v in option.values if self.spec.num_envs % v == 0))
            options[name] = option.suggest(trial, name)
        folder = self.folder / f"trial-{self._folder_number(trial)}"
        scores, falls = [], []
        for i in range(self.seeds):
            spec = replace(self.spec, **options, seed=self.spec.seed + i)
            place = folder / f"seed-{spec.seed}"
            seen: list[int] = []

            def watch(row: Mapping[str, Any], number: int = i, seen: list[int] = seen) -> None:
                if number or not row.get(STEP) or row.get(HELD_OUT) is None:
                    return
                # Rollouts differ in their length, and what is compared must not.
                seen.append(int(row[STEP]) // self.spec.eval_freq)
                trial.report(row[HELD_OUT], seen[-1])
                if len(seen) > WARMUP_EVALUATIONS and trial.should_prune():
                    raise optuna.TrialPruned

            summary = train_to_the_end(spec, place, watch)
            scores.append(summary["after"]["mean_reward"])
            falls.append(_fall(summary))
        trial.set_user_attr("fall", float(np.mean(falls)))
        if _sets_constraints():
            trial.set_constraint("fall", *self._excess(trial))
        return float(np.mean(scores))

    @staticmethod
    def _folder_number(trial: Any) -> int:
        """Return the number of the trial that began what a trial goes on with, or its own."""
        return int(trial.user_attrs.get("goes_on", trial.number))


def _complete(study: Any) -> list[Any]:
    """Return the trials that have come to their end."""
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _fall(summary: Mapping[str, Any]) -> float:
    """Return how far, of what is observed in a run, that fell which fell most."""
    before, after = (summary[when]["observed"] for when in ("before", "after"))
    return max((before[name] - after[name] for name in before), default=0.0)


def importance(study: Any, names: list[str]) -> dict[str, float]:
    """Return how much of the differences between trials each option explains, if it can be told."""
    optuna = _optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, params=names
            )
        except (ValueError, RuntimeError):  # There are too few trials.
            return {}
    return dict(found)


def _try(what: tuple[Search, int]) -> str:
    """Make a trial, and return a line that says how it went."""
    search, number = what
    lines: list[str] = []

    def tell(_: Any, trial: Any) -> None:
        value = "" if trial.value is None else f" {trial.value:.4f}"
        options = ", ".join(f"{name}={option}" for name, option in trial.params.items())
        failure = trial.user_attrs.get("failure", "")
        lines.append(f"trial {trial.number}: {trial.state.name.lower()}{value} {options} {failure}")

    def objective(trial: Any) -> float:
        try:
            return search.try_options(trial)
        except Diverged as error:
            trial.set_user_attr("failure", str(error))
            raise

    study = search.study(number)
    study.optimize(objective, n_trials=1, callbacks=[tell], catch=(Diverged,))
    return lines[0].rstrip()


def _sets_constraints() -> bool:
    """Return whether trials are told their constraints, as from Optuna 5 on."""
    return hasattr(_optuna().trial.Trial, "set_constraint")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "A search needs Optuna: pip install 'textenvs[tune]' (or optuna>=4)."
        ) from error
    return optuna
