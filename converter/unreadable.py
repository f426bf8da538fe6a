"""A row that cannot be read."""

from __future__ import annotations


class Unreadable(Exception):
    """One row cannot be read; the text is the reason in a few words. ``position``: its place among the rows that were asked for."""

    def __init__(self, reason: str, position: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.position = reason, position
