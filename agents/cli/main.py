"""The command line: `textenvs train`, `evaluate`, `compare`, `tune`, `list`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Annotated, Any, cast

import tyro
from rich.console import Console

import textenvs
from agents.cli.compare import Compare, compare
from agents.cli.errors import in_user_code, show_error
from agents.cli.evaluate import Evaluate, evaluate
from agents.cli.list import List, list_environments
from agents.cli.train import Train, train
from agents.cli.tune import Tune, tune
from agents.training.configs import parse_settings, read_options
from agents.training.folder import read_config

# What a user's mistake raises; anything else is one of ours and shows its traceback.
MISTAKES = (ValueError, TypeError, ImportError)


Command = Train | Evaluate | Compare | Tune | List
RUN: dict[type, Callable[[Any, Console], None]] = {
    Train: train,
    Evaluate: evaluate,
    Compare: compare,
    Tune: tune,
    List: lambda options, console: list_environments(console),
}


def parse(arguments: list[str] | None, saved: Train | None = None) -> Command:
    """Parse the command line; `train` takes its defaults from a run's options, if given."""
    return tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=saved or Train())]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Tune, tyro.conf.subcommand("tune")]
        | Annotated[List, tyro.conf.subcommand("list")],
        prog="textenvs",
        description="Text tasks as Gymnasium environments, and agents that train on them. "
        "--version says which version this is.",
        args=arguments,
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run it.

    A user's mistake ends with its message alone, or with the way through the user's own code;
    TEXTENVS_TRACEBACK=1 shows all of it.
    """
    sys.path.insert(0, "")  # so that a Task in the working directory is found
    arguments = joined(sys.argv[1:] if arguments is None else arguments)
    # A shell has no other way to write the end of a line.
    arguments = [
        word.replace("\\n", "\n") if before == "--template" else word
        for before, word in zip(["", *arguments], arguments, strict=False)
    ]
    if arguments == ["--version"]:
        Console().print(f"textenvs {textenvs.__version__}", highlight=False)
        return
    options = parse(arguments or ["--help"])
    console = Console()
    try:
        if isinstance(options, Train):
            options = cast("Train", _with_saved(arguments, options))
        RUN[type(options)](options, console)
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        raise SystemExit(130) from None
    except Exception as error:
        is_mistake = isinstance(error, MISTAKES) or in_user_code(error) is not None
        if os.environ.get("TEXTENVS_TRACEBACK") or not is_mistake:
            raise
        show_error(error, Console(stderr=True))
        raise SystemExit(2) from error


def _with_saved(arguments: list[str], options: Train) -> Command:
    """Return the options with those of a run that goes on, or of a file, where none were given."""
    own = {} if options.config is None else read_options(options.config)
    own |= parse_settings(options.set)
    if options.resume is not None:
        saved = replace(Train.from_config(read_config(options.resume)), **own)
    elif own:
        saved = Train(**own)
    else:
        return options
    # Once more, since only now it can be seen what was given besides.
    return parse(arguments, saved)


def joined(arguments: list[str]) -> list[str]:
    """Return arguments in which an option of several values that was repeated is given once.

    `--observe bleu --observe chrf` is `--observe bleu chrf`; tyro takes the last one alone.
    """
    every = [*fields(Train), *fields(Compare)]
    names = [field.name for field in every if "tuple" in str(field.type)]
    several = {f"--{name.replace('_', '-')}" for name in names}
    given: dict[str, list[str]] = {}
    result: list[str] = []
    into = result
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in several:
            name = name.replace("_", "-")
            into = given.setdefault(name, [])
            into += [value] if equals else []
        else:
            into = result if argument.startswith("--") or argument == "-h" else into
            into.append(argument)
    return [*result, *(word for name, values in given.items() for word in (name, *values))]
