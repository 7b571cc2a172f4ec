"""The command line: `textenvs train`, `textenvs evaluate`, `textenvs list`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, cast

import tyro
from rich.console import Console
from rich.markup import escape

from agents.cli.evaluate import Evaluate, evaluate
from agents.cli.list import List, list_environments
from agents.cli.train import Train, train
from agents.training.folder import read_config


def parse(arguments: list[str] | None, saved: Train | None = None) -> Train | Evaluate | List:
    """Parse the command line; `train` takes its defaults from a run's options, if given."""
    return tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=saved or Train())]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[List, tyro.conf.subcommand("list")],
        prog="textenvs",
        description="Text tasks as Gymnasium environments, and agents that train on them.",
        args=arguments,
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run it.

    A user's mistake ends with its message alone; TEXTENVS_TRACEBACK=1 shows where it came from.
    """
    sys.path.insert(0, "")  # so that a Task in the working directory is found
    options = parse(arguments)
    console = Console()
    try:
        if isinstance(options, Train):
            if options.resume is not None:
                saved = Train.from_config(read_config(options.resume))
                # Once more, since only now it can be seen what was given besides.
                options = cast("Train", parse(arguments, saved))
            train(options, console)
        elif isinstance(options, Evaluate):
            evaluate(options, console)
        else:
            list_environments(console)
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        raise SystemExit(130) from None
    except (ValueError, TypeError, ImportError) as error:
        if os.environ.get("TEXTENVS_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from error
