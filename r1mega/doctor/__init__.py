"""`r1mega doctor`: what this machine has, and what a config would use of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1mega.doctor.facts import Fact
from r1mega.doctor.machine import machine_facts, patches_table
from r1mega.errors import R1MegaError


def run_doctor(
    config: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    patches: bool = False,
    gpus: int | None = None,
    gpu: str = "h100-80",
) -> int:
    """Print the tables. Returns 0, or the exit code of the error that would keep `config` from running.

    gpus: look at `config` as if it were started on so many GPUs of kind `gpu`.
    """
    if patches:
        Console().print(patches_table())
        return 0
    console = Console(soft_wrap=True)
    console.print(_table("This machine", machine_facts()))
    if config is None:
        return 0
    from r1mega.doctor.config import config_facts

    try:
        title, facts, problem = config_facts(config, list(overrides), gpus, gpu)
    except R1MegaError as error:  # unreadable: there is nothing to tell about it
        title, facts, problem = str(config), [], error
    if facts:
        console.print(_table(title, facts))
    if problem is None:
        console.print(Text("this config can run here", style="green"))
        return 0
    console.print(Text(f"this config cannot run here: {type(problem).__name__}", style="red"))
    console.print(Text(str(problem)))
    return problem.exit_code


def _table(title: str, facts: Iterable[Fact]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    marks = {True: Text("yes", "green"), False: Text("no", "yellow"), None: Text("-", "dim")}
    for fact in facts:
        table.add_row(Text(fact.name), marks[fact.state], Text(fact.text))
    return table
