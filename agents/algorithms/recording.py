"""What an algorithm logs."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.utils import explained_variance

from agents import parallel
from agents.algorithms.arguments import for_transformers
from agents.algorithms.setup import SetUp
from agents.learning.updater import UpdateLog
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.statistics import add_turn, episode_sums, peak_memory, record_turns


class Recorded(SetUp):
    """The part of an algorithm that logs; `TransformerAlgorithm` has the rest.

    Attributes:
        episode_kl: By slot, the KL of the episode so far.
        rollout_began: At how many time steps.
    """

    whole_episodes: bool
    episode_kl: npt.NDArray[np.float64] | None
    rollout_began: int

    def record_infos(self, infos: list[dict[str, Any]], dones: npt.NDArray[np.bool_]) -> None:
        """Take in a step's infos, for the means of the last episodes and turns."""
        self._update_info_buffer(infos, dones)
        for info in infos:
            if info:
                add_turn(self.turn_metrics, info, self._stats_window_size)

    def record_kl(self, buffer: SequenceRolloutBuffer, kl: npt.NDArray[np.float32]) -> list[float]:
        """Log the KL to the reference; return that of each episode of all ranks that ended.

        Args:
            buffer: The complete rollout.
            kl: Of each of its tokens, as its arrays are.
        """
        every = np.concatenate(parallel.all_gather([kl[buffer.real]]))
        self.logger.record("kl/per_token", float(every.mean()))
        self.logger.record("kl/coef", self.kl_coef)
        begun_here = self.whole_episodes  # as all episodes then are
        if self.episode_kl is None or len(self.episode_kl) != buffer.n_envs or begun_here:
            self.episode_kl = np.zeros(buffer.n_envs)
        finished = parallel.all_gather(
            episode_sums(self.episode_kl, kl, buffer.episode_starts, buffer.episode_ends)
        )
        if finished:
            self.logger.record("kl/per_episode", float(np.mean(finished)))
        return finished

    def record_update(self, log: UpdateLog, terms: list[str]) -> None:
        """Log how an update went.

        Args:
            log: What it says of itself.
            terms: The names of its losses.
        """
        metrics = log.metrics
        for name in (*terms, "grad_norm"):
            if metrics[name]:
                self.logger.record(f"train/{name}", np.mean(metrics[name]))
        self.logger.record("train/approx_kl", log.approx_kl)
        first = parallel.all_gather(metrics["ratio_error"][:1])
        self.logger.record("train/first_ratio_error", max(first))
        self.logger.record("train/first_ratio_off", metrics["ratio_off"][0])
        self.logger.record("train/loss", metrics["loss"][-1])
        buffer = cast("SequenceRolloutBuffer", self.rollout_buffer)
        if self._text_policy().critic:
            own = buffer.values[buffer.real], buffer.returns[buffer.real]
            every = zip(*parallel.all_gather([own]), strict=True)
            explained = explained_variance(*map(np.concatenate, every))
            self.logger.record("train/explained_variance", explained)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        peak = peak_memory(self.device)
        if peak is not None:
            self.logger.record("time/peak_memory_mib", peak)

    def record_speed(self, what: str, started: float) -> None:
        """Log the rollout's tokens, of all ranks, by the second that something took."""
        seconds = time.perf_counter() - started
        tokens = self.num_timesteps - self.rollout_began
        self.logger.record(f"time/{what}_tokens_per_second", tokens / max(seconds, 1e-9))

    @for_transformers
    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log."""
        record_turns(self.turn_metrics, self.logger)
        own = self.ep_info_buffer, self.ep_success_buffer
        if parallel.count() > 1:
            self.ep_info_buffer, self.ep_success_buffer = (
                deque(parallel.all_gather(list(episodes or ()))) for episodes in own
            )
        super().dump_logs(iteration)
        self.ep_info_buffer, self.ep_success_buffer = own
