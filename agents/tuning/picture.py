"""Pictures of a search."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agents.files import read_json
from agents.reports.figures import drawn
from agents.tuning.search import FOUND

HISTORY = "search.png"


def plot_search(folder: Path) -> Path:
    """Draw the trials of a search, the best so far, and what mattered, into its folder.

    Args:
        folder: Of a search that has written what it found.
    """
    from matplotlib.ticker import MaxNLocator

    found = read_json(folder / FOUND)
    done = [t for t in found["trials"] if t["state"] == "COMPLETE"]
    pruned = [t for t in found["trials"] if t["state"] == "PRUNED" and t["evaluations"]]
    left_out = [t for t in done if t["left_out"]]
    kept = [t for t in done if not t["left_out"]] or done
    picture = folder / HISTORY
    with drawn(picture, 2, figsize=(11, 4), width_ratios=(3, 2)) as (_, (history, bars)):
        numbers, values = [t["number"] for t in kept], [t["value"] for t in kept]
        history.plot(numbers, values, "o", label="trial")
        if kept is not done and left_out:
            history.plot(
                [t["number"] for t in left_out],
                [t["value"] for t in left_out],
                "o",
                markerfacecolor="none",
                color="tab:red",
                label="left out: what is observed fell",
            )
        last = [list(t["evaluations"].values())[-1] for t in pruned]
        history.plot([t["number"] for t in pruned], last, "x", color="grey", label="given up")
        best = np.maximum.accumulate([*values, max(values)])
        end = max(t["number"] for t in found["trials"])
        history.step([*numbers, end], best, where="post", label="best so far")
        first = [t["value"] for t in done if t["as_it_is"]]
        if first:
            history.axhline(
                first[0], color="black", linewidth=0.8, linestyle=":", label="as it was"
            )
        history.set_xlabel("trial")
        history.xaxis.set_major_locator(MaxNLocator(integer=True))
        history.set_ylabel("held-out reward")
        history.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        history.grid(alpha=0.3)
        names = sorted(found["importance"], key=lambda name: found["importance"][name])
        bars.barh(names, [found["importance"][name] for name in names])
        bars.set_xlabel("importance (PED-ANOVA)")
    return picture
