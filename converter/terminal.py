"""Where progress and tables go: the error stream, in colour on a terminal that wants it, or nowhere.

rich leaves colours out where the stream is no terminal, where ``NO_COLOR`` is set or ``TERM`` is ``dumb``, and puts them in where ``FORCE_COLOR`` is set.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click
from rich.console import Console

QUIET = "diffusionblocks.quiet"
ARGUMENTS = "diffusionblocks.arguments"


def console() -> Console:
    """A console on the error stream; it says nothing where ``--quiet`` was given to the command that runs."""
    context = click.get_current_context(silent=True)
    return Console(stderr=True, highlight=False, markup=False, quiet=bool(context and context.meta.get(QUIET)))


def command() -> dict[str, str]:
    """The command that runs, as a bundle records it, under the key ``command``; nothing where Python code runs.

    Of absolute paths the last part alone: a bundle is shared, and where things lay is no one's business.
    """
    context = click.get_current_context(silent=True)
    given = None if context is None else context.meta.get(ARGUMENTS)
    if not given:
        return {}
    return {"command": shlex.join(["dbconvert", *(_name(str(argument)) for argument in given)])}


def _name(argument: str) -> str:
    option, equals, path = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    kind, colon, place = path.partition(":") if not Path(path).is_absolute() else ("", "", path)
    return option + equals + kind + colon + (Path(place).name if Path(place).is_absolute() else place)


def with_quiet(command: click.Command) -> None:
    """Give a command, or a group and all its commands, the option ``--quiet``."""
    command.params.append(
        click.Option(
            ["--quiet", "-q"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_remember,
            help="Nothing on the error stream but errors and warnings.",
        )
    )
    for member in command.commands.values() if isinstance(command, click.Group) else ():
        with_quiet(member)


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        context.meta[QUIET] = True
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # huggingface_hub's bars, before it is imported
