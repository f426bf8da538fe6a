"""Tensors that lie in a file and come into memory as far as they are read; their pages are given back when they are no longer needed.

A file of safetensors, mapped privately: reading is what the page cache holds, and nothing is ever written to it. Where the system has no ``madvise`` the
pages stay until the system wants them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from diffusionblocks.converter.saved import read_safetensors
from torch import nn

_DONTNEED, _MMAP_THRESHOLD = 4, -3
LARGE = 1 << 17
_storages: dict[int, torch.UntypedStorage] = {}
"""By address. They are never unmapped, so that no address can come to stand for other memory, of which the pages must not be dropped."""


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of safetensors whole or not at all: under another name, forced to the disk, then renamed.

    Tensors must be contiguous and must not share memory, but for views that are the same.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(plain, part, None if metadata is None else dict(metadata))
        part.chmod(0o644)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except safetensors.SafetensorError as error:
        part.unlink(missing_ok=True)
        raise OSError(*_os_error(error)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _os_error(error: Exception) -> tuple[int, str]:
    """safetensors wraps what the system says: its number stands in the text."""
    text = str(error)
    number = text.partition("os error ")[2].split(")")[0]
    return (int(number) if number.isdigit() else 5), text


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of safetensors by name, mapped.

    Raises:
        BadInput: it is truncated or no such file.
    """
    return as_mapped(read_safetensors(path)[0])


def as_mapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remember that these tensors, as :func:`saved.read_safetensors` gives them, lie in a mapped file."""
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        _storages[storage.data_ptr()] = storage
    return tensors


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a mapped file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _storages


def put_on_disk(modules: Iterable[tuple[str, nn.Module]], path: Path) -> None:
    """Move what ``modules`` hold in memory of their own into a file, and map it from there; what is mapped already stays where it is."""
    found: dict[str, torch.Tensor] = {}
    holders: dict[str, torch.Tensor] = {}
    for prefix, module in modules:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.numel() and not is_mapped(tensor) and tensor.is_contiguous():
                found[f"{prefix}.{name}"], holders[f"{prefix}.{name}"] = tensor.detach(), tensor
    if not found:
        return
    write_tensors(apart(found), path)
    for name, tensor in map_tensors(path).items():
        holders[name].data = tensor


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, those that share memory with an earlier one copied, as a file of safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Give back the memory of mapped tensors' pages: they are read again from the file when they are next used."""
    advise = _madvise()
    if advise is None:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    for tensor in tensors:
        if not is_mapped(tensor):
            continue
        start = tensor.data_ptr() // page * page
        advise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), _DONTNEED)


def give_back_large() -> None:
    """Let memory of a tensor of 128 KiB or more go back to the system as soon as it is freed, for the rest of the process.

    glibc keeps what was freed, up to 32 MiB a piece, and the pages of a pass that follows come on top of it: a tenth to a quarter more at the peak.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, LARGE)


def _madvise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
