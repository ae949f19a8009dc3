"""What several commands of `r1mega` take, and how its text is read."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo


def expanded_path(text: str) -> Path:
    """`~` in it replaced: no shell does that in --option=~/x."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise typer.BadParameter(f"{text}: there is no such home directory") from None


def path_option(said: str) -> OptionInfo:
    """Of a path that need not be given. said: its help."""
    return typer.Option(parser=expanded_path, help=said)


def positive(text: str) -> float:
    """A finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise typer.BadParameter(f"{text!r} is not a finite number above 0")


ConfigPath = Annotated[Path, typer.Argument(parser=expanded_path, help="a YAML file, see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ..., over the file")]


def _be_quiet(quiet: bool) -> bool:
    """For this process and those that it starts."""
    if quiet:
        from r1mega.observe.progress import QUIET

        os.environ[QUIET] = "1"
    return quiet


Quiet = Annotated[
    bool, typer.Option("--quiet", callback=_be_quiet, help="warnings and errors only, and where the report is")
]
Redo = Annotated[bool, typer.Option(help="run changed nodes anew, with their old runs moved aside")]
