"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from agents.reports.figures import drawn
from agents.training.logs import HELD_OUT, STEP
from agents.training.run import Run

CURVE = "learning_curve.png"

# What a learning curve shows: column of the log, label.
PANELS = (
    ("rollout/ep_rew_mean", "mean episode reward"),
    ("kl/per_episode", "KL to the reference (nats per episode)"),
    ("rollout/ep_len_mean", "response tokens per episode"),
    ("train/entropy_loss", "entropy (nats per token)"),
)


def plot_learning_curve(run: Run) -> Path | None:
    """Draw a run's log, and how good it was on held-out examples, into its folder.

    Args:
        run: One that is over.

    Returns:
        The PNG; None if the log holds nothing to draw.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows, summary = run.metrics(), run.summary()
    panels = [
        (column, label)
        for column, label in PANELS
        if any(row.get(column) is not None for row in rows)
    ]
    if not panels:
        return None
    picture = run.folder / CURVE
    size = (4.5 * len(panels), 3.6)
    with drawn(picture, len(panels), dpi=120, figsize=size) as (figure, axes):
        for axis, (column, label) in zip(axes, panels, strict=True):
            points = [(row[STEP], row[column]) for row in rows if row.get(column) is not None]
            sign = -1 if column == "train/entropy_loss" else 1
            axis.plot(
                [x for x, _ in points], [sign * y for _, y in points], marker=".", label="training"
            )
            axis.set_xlabel("tokens")
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_title(label, fontsize=10)
            axis.grid(alpha=0.3)
        held_out = [row for row in rows if row.get(HELD_OUT) is not None]
        if held_out:
            means = [row[HELD_OUT] for row in held_out]
            axes[0].plot([row[STEP] for row in held_out], means, marker="s", label="held out")
        for when, step in (("before", 0), ("after", summary["timesteps"])):
            mean, error = summary[when]["mean_reward"], summary[when]["standard_error"]
            bars = None if error is None else [2 * error]
            name = f"held out, {when}"
            axes[0].errorbar([step], [mean], yerr=bars, fmt="o", capsize=4, label=name)
        axes[0].legend(fontsize=8)
        figure.suptitle(summary["env_id"])
    return picture
