"""The command ``dbconvert doctor``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click
from diffusionblocks.converter.terminal import console
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from diffusionblocks.converter.doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(as_json: bool) -> None:
    """What of this machine and its packages helps or hinders, and the mend for each finding. Exit code 1 where something fails.

    \b
    Example: dbconvert doctor --json
    """
    from diffusionblocks.converter.doctor import PROBLEM, examine

    found = examine()
    problems = [f for f in found if f.status == PROBLEM]
    if as_json:
        click.echo(json.dumps({"ok": not problems, "findings": [f.to_json() for f in found]}, indent=1))
    else:
        screen = console()
        _draw(found, screen)
        count = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "No problem"
        screen.print(f"{count}; {sum(f.status == 'note' for f in found)} notes.")
    sys.exit(1 if problems else 0)


def _draw(found: list[Finding], screen: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=28)
    table.add_column()
    for finding in found:
        table.add_row(Text(finding.status, style=STYLES[finding.status]), finding.about, finding.found)
    screen.print(table)
    for finding in found:
        if finding.mend:
            screen.print()
            screen.print(f"{finding.about}:", style=STYLES[finding.status])
            screen.print(f"  {finding.mend}", soft_wrap=True)  # to be copied
    screen.print()
