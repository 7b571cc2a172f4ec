"""What a terminal would show."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def shown(renderable: Any, width: int = 100, colour: bool = False) -> str:
    """The text of something, with the codes of colours if there are any."""
    file = io.StringIO()
    system = "standard" if colour else None
    Console(
        file=file,
        width=width,
        force_terminal=colour,
        color_system=system,  # type: ignore[arg-type]
    ).print(renderable)
    return file.getvalue()
