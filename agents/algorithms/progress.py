"""The progress bar of several processes that train together."""

from __future__ import annotations

from stable_baselines3.common import callbacks

from agents import parallel


class ProgressBar(callbacks.ProgressBarCallback):
    """SB3's progress bar, over the steps of all ranks; the main one's is shown."""

    def _on_step(self) -> bool:
        self.pbar.update(self.training_env.num_envs * parallel.count())
        return True
