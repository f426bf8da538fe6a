"""What the process really has in memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_resident() -> int | None:
    """The most bytes of memory that were resident at once since the start (or :func:`restart_peak`); None where the system does not say."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def restart_peak() -> None:
    """Count the peak anew from here, where the system can (Linux)."""
    with suppress(OSError):
        CLEAR.write_text("5")
