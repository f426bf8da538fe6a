"""Whether a process of this machine is still there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there and no zombie."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    with suppress(OSError):
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        return status.rpartition(")")[2].split()[0] != "Z"
    return True
