"""What mkdocs asks for while it builds the site: the page of the commands, and roles of docstrings as plain code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click

PLACE = "<!-- commands -->"
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):(?=<code>|`)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """The help of every command in its place."""
    if PLACE not in markdown:
        return markdown
    from diffusionblocks.converter.cli import cli

    return markdown.replace(PLACE, "\n".join(_helps(cli)))


def _helps(group: click.Group) -> Iterator[str]:
    context = click.Context(group, info_name="dbconvert", max_content_width=96, terminal_width=96)
    yield f"```text\n{group.get_help(context)}\n```\n"
    for name in sorted(group.commands):
        own = click.Context(group.commands[name], parent=context, info_name=name, terminal_width=96)
        yield f"## dbconvert {name}\n\n```text\n{group.commands[name].get_help(own)}\n```\n"


def on_page_content(html: str, **kwargs: Any) -> str:
    """``:class:`` and the like, which the site has no use for, left out."""
    return ROLE.sub("", html)
