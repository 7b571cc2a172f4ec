from __future__ import annotations

import math
from pathlib import Path

from stable_baselines3.common.logger import configure

from agents.training.logs import read_metrics


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
