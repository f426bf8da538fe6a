"""Blocks over the ranks of torchrun: each rank has blocks of its own, and where there are more ranks than blocks, several share one.

Blocks train without a word between ranks, so none is needed: no process group is made but for ranks that share a block. torchrun ends all ranks when one dies. A rank
therefore trains in a process of its own session and only watches over it: told to end while a rank of this machine is gone, it lets its block be
finished; told to end otherwise, it ends it too.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from diffusionblocks.converter.roster import Roster
from diffusionblocks.runtime.errors import BadInput


@dataclass(frozen=True)
class Place:
    """This process among all: ``rank`` of ``world``, ``local`` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """From what torchrun says."""
        if "WORLD_SIZE" not in environment:
            return cls()
        try:
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return cls(rank, world, int(environment.get("LOCAL_RANK", rank)))
        except (KeyError, ValueError) as error:
            raise BadInput(
                "WORLD_SIZE is set, but RANK is not a number.", hint="Start it with torchrun, or unset WORLD_SIZE."
            ) from error


@dataclass(frozen=True)
class Share:
    """What a rank does: its ``blocks`` one after another, or as one of ``ranks`` (in order) one block together."""

    blocks: tuple[int, ...]
    ranks: tuple[int, ...]


def shares_of(blocks: Sequence[int], world: int) -> tuple[Share, ...]:
    """One share a rank: blocks in turn, or, with more ranks than blocks, a team of nearly equal size a block."""
    if world <= len(blocks):
        return tuple(Share(tuple(blocks[rank::world]), (rank,)) for rank in range(world))
    edges = [world * i // len(blocks) for i in range(len(blocks) + 1)]
    teams = [tuple(range(edges[i], edges[i + 1])) for i in range(len(blocks))]
    return tuple(Share((b,), team) for b, team in zip(blocks, teams, strict=True) for _ in team)


def in_own_session(place: Place, folder: Path) -> None:
    """Go on in a child process that torchrun cannot end; the parent stays, watches, and ends with the child's code.

    Does nothing outside torchrun, or where there is no fork. Called before threads are started.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        os.setsid()
        return
    watch = _Watch(place, folder, child)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, watch.on_signal)
    sys.stderr.flush()
    os._exit(watch.wait())


class _Watch:
    def __init__(self, place: Place, folder: Path, child: int) -> None:
        self.place, self.folder, self.child = place, folder, child

    def wait(self) -> int:
        _, status = os.waitpid(self.child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            self._say(f"Rank {self.place.rank} was ended by signal {-code}. {self._left()}")
            return 1
        if code == 0:
            Roster(self.folder).ended(self.place.rank)
        return code

    def on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM and self._one_is_gone():
            self._say(f"Rank {self.place.rank} goes on in process {self.child}. {self._left()}")
            os._exit(1)
        os.kill(self.child, number)

    def _one_is_gone(self) -> bool:
        """Whether another rank of this machine ended otherwise than it should (looked for a second long)."""
        for _ in range(10):
            if set(Roster(self.folder).gone()) - {self.place.rank}:
                return True
            time.sleep(0.1)
        return False

    def _left(self) -> str:
        from diffusionblocks.converter.runs import Run

        left = Run(self.folder).left(max(Roster(self.folder).owners(), default=-1) + 1)
        return f"Left to train: {left}. The same command goes on." if left else ""

    def _say(self, text: str) -> None:
        sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()
