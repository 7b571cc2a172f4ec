"""The command line: `textenvs train`, `textenvs evaluate`, `textenvs list`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agents.training.spec import Evaluate, List, Train, check_resumed, make_plan, read_options


def train(options: Train, console: Console) -> None:
    """Run `textenvs train`."""
    from agents import parallel
    from agents.training import run as runs

    quieten_hugging_face()
    if not parallel.is_main():
        console = Console(quiet=True)

    plan = make_plan(options)
    if options.resume is not None:
        folder, run = options.resume, runs.resume
        if runs.is_finished(folder):
            console.print(f"The run in {folder} is finished: nothing to do.", soft_wrap=True)
            return
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        own = options.run_dir or Path("runs") / plan.env_id / stamp
        folder, run = parallel.all_gather([own])[0], runs.train  # the main rank's
    config = asdict(options)
    del config["resume"]
    progress = options.progress and parallel.is_main()
    summary = run(plan, folder, config, console.print, progress)
    if not summary:
        return
    console.print(transcripts_table(*summary["samples"], count=5))
    table = Table(title=f"{plan.env_id}: {summary['timesteps']:,} tokens")
    for name in ("", "before", "after"):
        table.add_column(name)
    before, after = summary["before"], summary["after"]
    table.add_row("held-out reward", *(runs.show(e, plan.own_reward) for e in (before, after)))
    for label, key in (
        ("tokens per episode", "response_tokens"),
        ("ended by EOS", "stopped_by_eos"),
        ("distinct responses", "distinct_responses"),
    ):
        table.add_row(label, f"{before[key]:.2f}", f"{after[key]:.2f}")
    console.print(table)
    console.print(f"{summary['tokens_per_second']:,.0f} tokens/s on {summary['device']}")
    console.print(f"Run folder: {folder}", soft_wrap=True)


def evaluate(options: Evaluate, console: Console) -> None:
    """Run `textenvs evaluate`."""
    import gymnasium as gym

    from agents import PPO
    from agents.training import run as runs
    from agents.training.evaluation import evaluate_split

    quieten_hugging_face()
    trained, resolved = read_options(options.run)
    plan = make_plan(trained)
    env_id = runs.resolve_env_id(options.env) if options.env else plan.env_id
    kwargs = {**plan.env_kwargs, **plan.eval_kwargs}
    for name in ("max_prompt_tokens", "max_new_tokens"):
        kwargs[name] = resolved[name]
    env = gym.make(env_id, split=options.split or plan.eval_split, **kwargs)
    agent = options.run / runs.AGENT
    if not agent.is_file():
        agent = options.run / runs.CHECKPOINT
        if not agent.is_file():
            raise ValueError(
                f"The run in {options.run} has no agent and no checkpoint yet: "
                f"go on with it by textenvs train --resume {options.run}."
            )
        console.print("The run is not finished: this is its last checkpoint.")
    model = PPO.load(agent, device=options.device)
    result = evaluate_split(
        model, env, options.max_examples, options.deterministic, seed=options.seed
    )
    console.print(transcripts_table(result.records(), count=options.samples))
    table = Table("", env_id)
    for name, value in result.summary().items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def quieten_hugging_face() -> None:
    """Show no bar for every file of a model that is read or written."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def list_environments(console: Console) -> None:
    """Run `textenvs list`."""
    import textenvs
    from textenvs.registration import load_task

    table = Table("id", "task", "best return", "turns", "response budget")
    table.columns[0].no_wrap = True
    for env_id in textenvs.task_ids():
        task = load_task(env_id)
        summary = (type(task).__doc__ or "").strip().split("\n")[0]
        best = "" if task.best_return is None else f"{task.best_return:.2f}"
        table.add_row(env_id, summary, best, str(task.max_turns), str(task.max_new_tokens))
    console.print(table)


def transcripts_table(*evaluations: list[dict[str, Any]], count: int) -> Table:
    """Return transcripts side by side, from their records: the same examples before and after."""
    table = Table(show_lines=True)
    titles = ("before", "after") if len(evaluations) == 2 else ("transcript",)
    for title in titles:
        table.add_column(title, ratio=1)
        table.add_column("reward", justify="right")
    step = max(1, len(evaluations[0]) // max(1, count))
    for i in range(0, len(evaluations[0]), step)[:count]:
        cells = []
        for records in evaluations:
            text = "\n".join(f"{turn['role']}: {turn['text']}" for turn in records[i]["turns"])
            cells += [escape(text), f"{records[i]['reward']:.2f}"]
        table.add_row(*cells)
    return table


def parse(arguments: list[str] | None, saved: Train | None = None) -> Train | Evaluate | List:
    """Parse the command line; `train` takes its defaults from a run's options, if given."""
    return tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=saved or Train())]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[List, tyro.conf.subcommand("list")],
        prog="textenvs",
        description="Text tasks as Gymnasium environments, and PPO for transformers.",
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
                saved, _ = read_options(options.resume)
                # Once more, since only now it can be seen what was given besides.
                options = cast("Train", parse(arguments, saved))
                check_resumed(options, saved)
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
