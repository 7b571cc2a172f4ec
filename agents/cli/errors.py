"""What the command line says when something fails."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import agents
import textenvs

# Whose code is not the user's: ours and Python's; nor is what is installed.
_OTHERS = tuple(
    f"{folder}{os.sep}"
    for folder in (
        *(Path(str(package.__file__)).parent for package in (agents, textenvs)),
        sysconfig.get_path("stdlib"),
    )
)
_INSTALLED = {"site-packages", "dist-packages"}


def show_error(error: Exception, console: Console) -> None:
    """Show an error's message and, where the user's code raised it, the way through that code."""
    raised = in_user_code(error)
    if raised is not None:
        cause, frames = raised
        console.print("In your code (most recent call last):", highlight=False)
        lines = [*traceback.format_list(frames), *traceback.format_exception_only(cause)]
        text = "".join(lines).rstrip()
        console.print(escape(text), highlight=False, soft_wrap=True)
        if cause is error:
            return
    console.print(f"[red]Error:[/red] {escape(str(error))}", highlight=False)


def in_user_code(
    error: BaseException,
) -> tuple[BaseException, list[traceback.FrameSummary]] | None:
    """Return what of an error and its causes the user's code raised, and the way through that code.

    Returns:
        None if none of it came through the user's code.
    """
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _is_users(frame)]
        if frames:
            return cause, frames
        cause = cause.__cause__
    return None


def _is_users(frame: traceback.FrameSummary) -> bool:
    """Return whether code is neither ours, nor Python's, nor an installed package's."""
    path = Path(frame.filename).absolute()
    return not (
        frame.filename.startswith("<")
        or str(path).startswith(_OTHERS)
        or _INSTALLED & set(path.parts)
    )
