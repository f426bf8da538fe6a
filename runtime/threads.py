"""How many threads an operator gets: the machine's cores, as far as this process may use them."""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")


def cores() -> int:
    """Physical cores this process may run on; 0 (onnxruntime's own choice) where the system does not say.

    Said explicitly, since onnxruntime otherwise ties its threads to cores, which disturbs a process that runs one session after another.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    siblings: set[str] = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings.add((CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            return 0
    return len(siblings)
