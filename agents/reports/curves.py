"""Pictures of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from agents.files import atomic_path

# What a learning curve shows: column of the log, label.
PANELS = (
    ("rollout/ep_rew_mean", "mean episode reward"),
    ("kl/per_episode", "KL to the reference (nats per episode)"),
    ("rollout/ep_len_mean", "response tokens per episode"),
    ("train/entropy_loss", "entropy (nats per token)"),
)


def plot_learning_curve(
    progress: Path,
    picture: Path,
    title: str,
    held_out: dict[str, tuple[int, float, float]] | None = None,
) -> None:
    """Draw a run's log.

    Args:
        progress: SB3's progress.csv.
        picture: The PNG to write.
        title: Goes above.
        held_out: Points for the reward's panel: label to (timesteps, mean, standard error).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with progress.open(newline="") as file:
        rows = list(csv.DictReader(file))
    panels = [(column, label) for column, label in PANELS if any(row.get(column) for row in rows)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for axis, (column, label) in zip(axes[0], panels, strict=True):
        points = [
            (int(row["time/total_timesteps"]), float(row[column]))
            for row in rows
            if row.get(column)
        ]
        sign = -1 if column == "train/entropy_loss" else 1
        axis.plot(
            [x for x, _ in points], [sign * y for _, y in points], marker=".", label="training"
        )
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    for name, (step, mean, error) in (held_out or {}).items():
        axes[0][0].errorbar([step], [mean], yerr=[2 * error], fmt="o", capsize=4, label=name)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
