from __future__ import annotations

from typing import Any

import pytest

from agents.reports.live import LiveLines, duration, metrics_table
from tests.agents.reports.screens import shown

ROLLOUT = {
    "time/total_timesteps": 8192,
    "time/time_elapsed": 4,
    "time/fps": 2048,
    "rollout/ep_rew_mean": 0.12345,
    "rollout/ep_len_mean": 12.0,
    "rollout/response_length": 12.0,
    "rollout/eos_rate": 1.0,
    "rollout/success_rate": 0.5,
    "rollout/well_formed": 0.984,
    "kl/per_episode": 0.5,
    "train/loss": 0.25,
}


def lines(*rows: dict[str, Any], **options: Any) -> list[str]:
    written: list[str] = []
    live = LiveLines(written.append, 131_072, **options)
    for row in rows:
        live(row)
    return written


def test_rollouts() -> None:
    second = {**ROLLOUT, "time/total_timesteps": 16_384, "time/time_elapsed": 3605}
    assert lines(ROLLOUT, second) == [
        "   tokens   reward  success  well_formed       KL  tokens/s  elapsed     left",
        "    8,192    0.123      50%         0.98     0.50     2,048     0:04         ",
        "   16,384    0.123      50%         0.98     0.50     2,048  1:00:05     0:56",
    ]


def test_header_comes_again_with_other_columns() -> None:
    first = {name: v for name, v in ROLLOUT.items() if not name.startswith(("rollout", "kl"))}
    written = lines(first, ROLLOUT, ROLLOUT)
    assert [line.split()[0] for line in written] == ["tokens", "8,192", "tokens", "8,192", "8,192"]
    assert written[0].split() == ["tokens", "tokens/s", "elapsed", "left"]
    assert "success" not in lines(ROLLOUT, show_success=False)[0]
    assert lines({**ROLLOUT, "kl/per_episode": -0.001})[1].split()[4] == "0.00"


def test_evaluations() -> None:
    row = {"time/total_timesteps": 4096, "eval/mean_reward": 0.5, "eval/standard_error": 0.01}
    row |= {"eval/mean_ep_length": 9.0, "eval/well_formed": 0.9, "eval/success_rate": 0.25}
    worse = {"time/total_timesteps": 8192, "eval/mean_reward": 0.25}
    before, after = ({**worse, "time/total_timesteps": steps} for steps in (0, 131_072))
    assert lines(before, row, worse, after) == [  # before and after are told by themselves
        "    4,096  held-out reward 0.500 ± 0.010, success 25%, well_formed 0.90, the best so far",
        "    8,192  held-out reward 0.250, the best was 0.500",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_every_metric() -> None:
    text = shown(metrics_table(ROLLOUT))
    assert all(name in text for name in ROLLOUT) and "0.12345" in text and "8,192 tokens" in text
