"""Whether a process of this machine is still there."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_SYNCHRONIZE, _TIMEOUT = 0x100000, 258


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there and no zombie."""
    if sys.platform == "win32":
        return _is_alive_on_windows(process, ctypes.windll.kernel32)  # type: ignore[attr-defined, unused-ignore]
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


def _is_alive_on_windows(process: int, kernel: Any) -> bool:
    """There ``os.kill(process, 0)`` is no question: it presses Ctrl-C."""
    handle = kernel.OpenProcess(_SYNCHRONIZE, False, process)
    if not handle:
        return False
    try:
        return bool(kernel.WaitForSingleObject(handle, 0) == _TIMEOUT)
    finally:
        kernel.CloseHandle(handle)
