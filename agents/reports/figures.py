"""Drawing into a file, without a screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agents.files import atomic_path


@contextmanager
def drawn(picture: Path, columns: int, dpi: int = 110, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes side by side, an array of them, and write it at the end.

    Args:
        picture: The PNG.
        columns: How many axes.
        dpi: Dots per inch.
        **options: As for `matplotlib.pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, squeeze=False, **options)
    try:
        yield figure, axes[0]
        figure.tight_layout()
        with atomic_path(picture) as temporary:
            figure.savefig(temporary, dpi=dpi)
    finally:
        plt.close(figure)
