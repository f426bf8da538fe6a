"""The zoo: architectures with random weights and small configurations, each with its known number of residual branches.

The counts were read off the sources before any finder ran (docs/coverage.md has the rules); the list only ever grows.
"""

from __future__ import annotations

from importlib import import_module

from zoo.entry import Entry

FAMILIES = ("timm", "torchvision", "transformers", "diffusers", "own")


def entries(family: str) -> tuple[Entry, ...]:
    """The entries of one family; their packages are imported when an entry is built."""
    found: tuple[Entry, ...] = import_module(f"zoo.{family}_models").ENTRIES
    return found
