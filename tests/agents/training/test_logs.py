from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from stable_baselines3.common.logger import configure

from agents.training.folder import PROGRESS
from agents.training.logs import continue_log, read_metrics


def test_numbers_are_numbers(tmp_path: Path) -> None:
    logger = configure(str(tmp_path), ["csv"])
    logger.record("steps", 128)
    logger.record("loss", 1.5e-7)
    logger.dump()
    logger.record("steps", 256)
    logger.record("loss", float("nan"))
    logger.record("note", "one, two")  # a column that the first row lacks
    logger.dump()
    logger.close()
    first, second = read_metrics(tmp_path / "progress.csv")
    assert first == {"steps": 128, "loss": 1.5e-7, "note": None}
    assert type(first["steps"]) is int
    assert math.isnan(second.pop("loss")) and second == {"steps": 256, "note": "one, two"}


def test_row_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    assert read_metrics(path) == []
    path.write_text("steps,loss\n128,0.5\n256,0.")
    assert read_metrics(path) == [{"steps": 128, "loss": 0.5}]
    path.write_text("steps,lo")
    assert read_metrics(path) == []


def test_a_cut_row_is_none_however_the_columns_stand(tmp_path: Path) -> None:
    """SB3 orders new columns as it likes: what is left of a row may look like an evaluation's."""
    path = tmp_path / PROGRESS
    header = "eval/mean_reward,time/total_timesteps,time/iterations,time/time_elapsed\n"
    whole = header + "0.25,0,,\n,128,1,3\n"
    path.write_text(whole + "1,12")  # of 128
    model = SimpleNamespace(num_timesteps=256, set_logger=lambda logger: logger.close())
    assert continue_log(cast("Any", model), tmp_path, tensorboard=False) == 3
    assert path.read_text() == whole
