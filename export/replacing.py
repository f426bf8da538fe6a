"""A folder that takes another's place in one step, so that there is a whole one under the name at every moment; and what killed processes left beside it.

Linux (``renameat2``) and macOS (``renamex_np``) exchange two names. Where the file system cannot, the older folder is moved aside first: a process that is killed between the two renames leaves
it there, and the next export brings it back.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from diffusionblocks.runtime.processes import is_alive

OLD = "old"
_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2


def scratch_folder(target: Path) -> Path:
    """A new folder beside ``target`` that says whose it is.

    Raises:
        OSError: it cannot be made.
    """
    return Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}{os.getpid()}.", dir=target.parent))


def clear_litter(target: Path) -> None:
    """Remove what killed processes of this machine left beside ``target``, and bring back what was moved aside from its place."""
    prefix = _prefix(target)
    for folder in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        process = folder.name.removeprefix(prefix).partition(".")[0]
        if process.isdigit() and not is_alive(int(process)):
            if (folder / OLD).is_dir() and not target.exists():
                os.rename(folder / OLD, target)
            shutil.rmtree(folder, ignore_errors=True)


def replace(folder: Path, target: Path) -> None:
    """Give ``folder`` the name ``target``; what had that name is removed.

    Raises:
        OSError: it cannot be renamed; what had the name has it still.
    """
    if not target.exists():
        os.rename(folder, target)
        return
    if exchange(folder, target):
        _remove(folder)
        return
    aside = scratch_folder(target)
    os.rename(target, aside / OLD)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(aside / OLD, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or its file system cannot."""
    if not sys.platform.startswith(("linux", "darwin")):
        return False
    libc, first, second = ctypes.CDLL(None), os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(first, second, _SWAP) == 0)
    return False


def _prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}_"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
