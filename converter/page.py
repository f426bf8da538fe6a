"""Lines of text that fit a console: rails on the left, numbers in columns on the right, long names shortened in the middle."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from diffusionblocks.runtime.budget import format_bytes
from rich.console import Console
from rich.text import Text

ASCII = str.maketrans({"│": "|", "├": "+", "─": "-", "┊": ":", "■": "#", "◇": "*", "←": "<", "…": "~"})
WIDEST = 100
INDENT, BYTES, SHARE = 2, 11, 8


class Page:
    """Prints to ``console``; ``largest`` is the largest number of the column of parameters."""

    def __init__(self, console: Console, largest: int) -> None:
        self.console, self.ascii = console, console.options.ascii_only
        self.width = min(max(console.width, 40), WIDEST)
        self.numbers = max(len(f"{largest:,}"), len("parameters")) + 2
        self.names = 0  # width of the column of names, see fit

    def line(self, text: str = "", style: str = "") -> None:
        """One line, cut where it is too long."""
        self._print(Text(shortened(text, self.width), style=style))

    def unbroken(self, text: str, indent: int) -> None:
        """A line that is left whole, however long (a path to be copied)."""
        self.console.print(Text(" " * indent + text), soft_wrap=True)

    def text(self, text: str, indent: int = 0, style: str = "") -> None:
        """A paragraph."""
        for line in textwrap.wrap(text, self.width - indent, break_on_hyphens=False):
            self._print(Text(" " * indent + line, style=style))

    def notes(self, notes: Iterable[str]) -> None:
        """Paragraphs, with an empty line before the first."""
        for k, note in enumerate(notes):
            if k == 0:
                self.line()
            self.text(note, style="dim")

    def list(self, title: str, items: Sequence[str], count: int) -> None:
        """A titled list of the first ``count`` items."""
        self.line()
        self.text(f"{title}: {self.first(items, count)}")

    @staticmethod
    def first(items: Sequence[str], count: int) -> str:
        """The first ``count`` items, and how many more there are."""
        more = f" and {len(items) - count} more" if len(items) > count else ""
        return ", ".join(items[:count]) + more

    def heading(self) -> None:
        """The titles of the columns of numbers."""
        self._row("", Text(), ("bytes", "share", "parameters"), "dim")

    def piece(self, title: str, size: dict[str, Any], note: str = "") -> None:
        """Stem, block or head, with its size; the note stands behind the title where there is room, else below it."""
        numbers = (format_bytes(size["bytes"]), f"{100 * size['share']:.1f} %", f"{size['parameters']:,}")
        room = self.room("■ ") - BYTES - SHARE - self.numbers
        fits = len(title) + 3 + len(note) <= room
        self._row("■ ", Text(f"{title}   {note}" if note and fits else title, style="bold"), numbers)
        if note and not fits:
            self.row("│ ", note)

    def fit(self, names: Sequence[str], formulas: Sequence[str]) -> None:
        """Make the column of names as wide as the longest of these, if the formulas leave that much room."""
        room = self.room("├─ ") - 2 - max(map(len, formulas), default=0) - self.numbers
        self.names = min(max(map(len, names), default=0), room)

    def unit(self, name: str, formula: str, parameters: int) -> None:
        """A unit of the trunk."""
        left = Text(shortened(name, self.names).ljust(self.names) + "  ") + Text(formula, style="cyan")
        self._row("├─ ", left, ("", "", f"{parameters:,}"))

    def room(self, rail: str) -> int:
        """Characters that fit beside a rail."""
        return self.width - INDENT - len(rail)

    def row(self, rail: str, text: str, style: str = "") -> None:
        """A line beside the rail."""
        self._print(Text(" " * INDENT + rail, style="dim") + Text(shortened(text, self.room(rail)), style=style))

    def _row(self, rail: str, left: Text, numbers: tuple[str, str, str], style: str = "") -> None:
        widths = (BYTES, SHARE, self.numbers)
        right = "".join(n.rjust(w) for n, w in zip(numbers, widths, strict=True)).lstrip()
        line = Text(" " * INDENT + rail, style="dim") + left
        line.truncate(self.width - len(right) - 1, overflow="ellipsis", pad=True)
        self._print(line + Text(" " + right, style=style))

    def _print(self, line: Text) -> None:
        if self.ascii:
            line.plain = line.plain.translate(ASCII)
        self.console.print(line, no_wrap=True, overflow="crop", crop=True)


def shortened(text: str, width: int) -> str:
    """``text``, with its middle left out where it is longer than ``width``."""
    if len(text) <= width:
        return text
    width = max(width, 3)
    tail = (width - 1) * 2 // 3
    return text[: width - 1 - tail] + "…" + text[-tail:]


def shape(sizes: Sequence[int | str]) -> str:
    """``[batch, 197, 192]``."""
    return f"[{', '.join(map(str, sizes))}]"


def join(words: Iterable[str]) -> str:
    """``a, b and c``."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def counted(count: int, noun: str) -> str:
    """``1 unit``, ``2 units``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
