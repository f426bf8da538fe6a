"""The command ``dbconvert completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_DBCONVERT_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and files.

    \b
    Examples:
    eval "$(dbconvert completion bash)"                                        # in ~/.bashrc; zsh in ~/.zshrc
    dbconvert completion fish > ~/.config/fish/completions/dbconvert.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "dbconvert", VARIABLE).source())
