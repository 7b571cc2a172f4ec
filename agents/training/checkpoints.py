"""Checkpoints that a run can go on from exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_baselines3.common import callbacks

from agents import parallel
from agents.algorithms.checks import check_finite
from agents.files import atomic_path


class CheckpointCallback(callbacks.CheckpointCallback):
    """SB3's callback, for checkpoints from which `agents.PPO` goes on as if never interrupted.

    It saves between rollouts, before the first rollout that starts `save_freq` steps or more after
    the last checkpoint, and when training ends. A checkpoint is written beside its place and then
    moved there, so that a process killed at any moment leaves whole ones only. An agent whose
    weights are not finite is not saved: that is an error, and the last checkpoint stays. With
    several ranks the main one writes.

    Args:
        save_freq: How many steps to let pass, in calls of `env.step()` as in SB3.
        save_path: The folder.
        name_prefix: What the files' names start with.
        save_replay_buffer: Whether to save the replay buffer, of algorithms that have one.
        save_vecnormalize: Whether to save `VecNormalize` by itself, too. `agents.PPO` needs none
            of it for text.
        replace: Whether to keep the last checkpoint only, as `{name_prefix}.zip`.
        verbose: 2: say when a checkpoint is written.
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str,
        name_prefix: str = "rl_model",
        save_replay_buffer: bool = False,
        save_vecnormalize: bool = False,
        verbose: int = 0,
        *,
        replace: bool = False,
    ) -> None:
        if save_freq < 1:
            raise ValueError(f"save_freq must be at least 1 step, but it is {save_freq}.")
        super().__init__(
            save_freq,
            str(save_path),
            name_prefix,
            save_replay_buffer,
            save_vecnormalize,
            verbose,
        )
        self.replace = replace
        self._saved_at = 0

    def _checkpoint_path(self, checkpoint_type: str = "", extension: str = "") -> str:
        if not self.replace:
            return super()._checkpoint_path(checkpoint_type, extension)
        kind = f"_{checkpoint_type.rstrip('_')}" if checkpoint_type else ""
        return str(Path(self.save_path) / f"{self.name_prefix}{kind}.{extension}")

    def _init_callback(self) -> None:
        if parallel.is_main():  # It makes the folder.
            super()._init_callback()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.n_calls - self._saved_at >= self.save_freq:
            self._save()

    def _on_training_end(self) -> None:
        if self.n_calls > self._saved_at:
            self._save()

    def _save(self) -> None:
        model: Any = self.model
        check_finite(model)  # on every rank, so that all of them end
        self._saved_at = self.n_calls
        if not parallel.is_main():
            return
        self.num_timesteps = model.num_timesteps  # At the last step it was without other ranks'.
        normalizer = model.get_vec_normalize_env()
        # The agent comes last: where it is, the rest is complete.
        if self.save_replay_buffer and getattr(model, "replay_buffer", None) is not None:
            self._write(model.save_replay_buffer, "replay_buffer_", "pkl")
        if self.save_vecnormalize and normalizer is not None:
            self._write(normalizer.save, "vecnormalize_", "pkl")
        self._write(model.save, "", "zip")

    def _write(self, save: Any, kind: str, extension: str) -> None:
        path = Path(self._checkpoint_path(kind, extension))
        with atomic_path(path) as temporary:
            save(str(temporary))
        if self.verbose >= 2:
            self.logger.info(f"Saved checkpoint {path}")
