"""Draw the picture in docs/architecture.md: the files that an iteration leads through.

python scripts/draw_architecture.py [FILE]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).parents[1] / "docs" / "architecture.png"

ROLLOUT, END, UPDATE = "#1f77b4", "#2a8c3c", "#c25a00"
PHASES = {
    ROLLOUT: "rollout",
    END: "end of the rollout",
    UPDATE: "update",
}
# Left edges and widths of the columns; bottoms and heights of the rows; in elevenths of an inch.
COLUMNS = [(9, 18), (35, 18), (61, 18), (87, 18)]
ROWS = {"top": (50, 8), "upper": (35, 8), "lower": (22, 8), "both": (22, 21), "bottom": (4, 8)}
SIZE = (107, 63)


@dataclass(frozen=True)
class Box:
    """A file, and what of it the walk calls.

    Args:
        path: From the root of the repository.
        calls: Its functions, a line each.
        column: The number of its column.
        row: The name of its row.
    """

    path: str
    calls: str
    column: int
    row: str

    @property
    def frame(self) -> tuple[float, float, float, float]:
        """Left, bottom, width and height."""
        (left, width), (bottom, height) = COLUMNS[self.column], ROWS[self.row]
        return left, bottom, width, height


@dataclass(frozen=True)
class Arrow:
    """A call of the walk; the arrows are numbered in the order in which they are given.

    Args:
        start: Where it begins.
        stop: Where it ends.
        color: That of its phase.
    """

    start: tuple[float, float]
    stop: tuple[float, float]
    color: str


BOXES = (
    Box("agents/algorithms/ppo.py", "PPO.losses", 0, "top"),
    Box("agents/algorithms/base.py", "collect_rollouts\ncomplete_rollout\ntrain", 0, "both"),
    Box("agents/rollouts/vec_env.py", "step_wait", 1, "top"),
    Box("agents/rollouts/collector.py", "StepSource.fill", 1, "upper"),
    Box("agents/rollouts/buffer.py", "add, finish, batch", 1, "lower"),
    Box("textenvs/envs/engine.py", "TextEngine.step", 2, "top"),
    Box("agents/policies/base.py", "act, score", 2, "both"),
    Box("agents/models/causal.py", "next_hidden\nhidden_states\nlogits", 3, "both"),
    Box("agents/learning/advantages.py", "GAE", 0, "bottom"),
    Box("agents/learning/updater.py", "update", 1, "bottom"),
    Box("agents/learning/objective.py", "Objective.backward", 2, "bottom"),
    Box("agents/decoding/prefix_cache.py", "last_hidden", 3, "bottom"),
)
ARROWS = (
    Arrow((1, 39), (9, 39), ROLLOUT),
    Arrow((27, 39), (35, 39), ROLLOUT),
    Arrow((53, 39), (61, 39), ROLLOUT),
    Arrow((79, 36), (87, 36), ROLLOUT),
    Arrow((101.5, 22), (101.5, 12), ROLLOUT),
    Arrow((44, 43), (44, 50), ROLLOUT),
    Arrow((53, 54), (61, 54), ROLLOUT),
    Arrow((44, 35), (44, 30), ROLLOUT),
    Arrow((22, 22), (22, 12), END),
    Arrow((18, 43), (18, 50), UPDATE),
    Arrow((26, 22), (40, 12), UPDATE),
    Arrow((53, 8), (61, 8), UPDATE),
    Arrow((62, 12), (48, 22), UPDATE),
    Arrow((72, 12), (72, 22), UPDATE),
    Arrow((79, 29), (87, 29), UPDATE),
)


def draw(file: Path) -> None:
    """Draw the picture into a file."""
    figure = plt.figure(figsize=(SIZE[0] / 11, SIZE[1] / 11))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect="equal")
    axes.axis("off")
    _draw_folders(axes)
    for box in BOXES:
        _draw_box(axes, box)
    for number, arrow in enumerate(ARROWS, start=1):
        _draw_arrow(axes, arrow, number)
    axes.text(4.2, 42, "learn", ha="center", va="center", fontsize=8.5, color="#333333")
    for i, (color, phase) in enumerate(PHASES.items()):
        y = 58 - 4 * i
        axes.add_patch(_arrow((87, y), (92, y), color))
        axes.text(93.5, y, phase, va="center", fontsize=8.5, color="#333333")
    figure.savefig(file, dpi=200)
    plt.close(figure)


def _draw_folders(axes: Axes) -> None:
    """Draw a frame around the files of each folder, with its name."""
    for folder in dict.fromkeys(str(Path(box.path).parent) for box in BOXES):
        frames = [box.frame for box in BOXES if str(Path(box.path).parent) == folder]
        left, bottom = (min(frame[i] for frame in frames) - 1 for i in (0, 1))
        right = max(frame[0] + frame[2] for frame in frames) + 1
        top = max(frame[1] + frame[3] for frame in frames) + 3.6
        style = "round,pad=0,rounding_size=1"
        frame = (left, bottom), right - left, top - bottom
        axes.add_patch(FancyBboxPatch(*frame, boxstyle=style, fc="#f1f2f4", ec="none"))
        axes.text(left + 1, top - 1.9, f"{folder}/", va="center", fontsize=8.5, color="#555555")


def _draw_box(axes: Axes, box: Box) -> None:
    left, bottom, width, height = box.frame
    style = "round,pad=0,rounding_size=0.8"
    patch = FancyBboxPatch((left, bottom), width, height, style, fc="white", ec="#8a8f98")
    axes.add_patch(patch)
    middle, lines = left + width / 2, box.calls.count("\n") + 1
    y = bottom + height / 2 + 1.3 * lines
    axes.text(middle, y, Path(box.path).name, ha="center", va="center", fontsize=10, weight="bold")
    y -= 2.6
    for line in box.calls.split("\n"):
        axes.text(middle, y, line, ha="center", va="center", fontsize=8.5, color="#333333")
        y -= 2.6


def _draw_arrow(axes: Axes, arrow: Arrow, number: int) -> None:
    axes.add_patch(_arrow(arrow.start, arrow.stop, arrow.color))
    x, y = ((a + b) / 2 for a, b in zip(arrow.start, arrow.stop, strict=True))
    axes.add_patch(Circle((x, y), 1.5, fc=arrow.color, ec="white", zorder=3))
    axes.text(
        *(x, y - 0.08),
        str(number),
        ha="center",
        va="center",
        fontsize=8,
        color="white",
        weight="bold",
        zorder=4,
    )


def _arrow(start: tuple[float, float], stop: tuple[float, float], color: str) -> FancyArrowPatch:
    style = "-|>,head_length=4,head_width=2.2"
    return FancyArrowPatch(
        start, stop, arrowstyle=style, shrinkA=0, shrinkB=0, color=color, lw=1.4, zorder=2
    )


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
