"""Which process has which blocks, in the folder of a training that is under way; read without torch.

rank_1.json     its processes (the one that trains, the one that watches over it), their machine, its blocks
rank_1.ended    it ended as it should
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionblocks.runtime.processes import is_alive as is_alive


@dataclass(frozen=True)
class Roster:
    """``folder``: the bundle's ``train/run``."""

    folder: Path

    def register(self, rank: int, blocks: Iterable[int]) -> None:
        """Say which process has which blocks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank_{rank}.ended").unlink(missing_ok=True)
        about = {"processes": [os.getpid(), os.getppid()], "host": socket.gethostname(), "blocks": list(blocks)}
        write_text(self.folder / f"rank_{rank}.json", json.dumps(about))

    def owners(self) -> dict[int, tuple[int, bool]]:
        """For each block the rank that has it, and whether that rank's process is there (of another machine it is taken to be)."""
        found: dict[int, tuple[int, bool]] = {}
        for rank, about in self._ranks().items():
            found |= {int(b): (rank, _is_there(about, 1)) for b in about["blocks"]}
        return found

    def gone(self) -> list[int]:
        """Ranks of this machine that ended without a word: they themselves, or who watches over them."""
        return [
            rank
            for rank, about in self._ranks().items()
            if not _is_there(about, 2) and not (self.folder / f"rank_{rank}.ended").exists()
        ]

    def ended(self, rank: int) -> None:
        """Say that a rank ended as it should."""
        if self.folder.is_dir():  # the bundle may have been refreshed meanwhile
            (self.folder / f"rank_{rank}.ended").touch()

    def _ranks(self) -> dict[int, dict[str, Any]]:
        paths = sorted(self.folder.glob("rank_*.json"))
        return {int(path.stem.removeprefix("rank_")): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _is_there(about: Mapping[str, Any], processes: int) -> bool:
    """Whether the first of a rank's processes are there."""
    here = about["host"] == socket.gethostname()
    return not here or all(map(is_alive, about["processes"][:processes]))


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
