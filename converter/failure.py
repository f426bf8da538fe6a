"""Where a model could not be captured: the module and the line of its code that the error came through."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter.capture import EXAMPLE_BATCH
from torch import nn
from torch.export import Dim

TORCH = str(Path(torch.__file__).parent)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says where an export fails: its warnings, and the whole graph on stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def place_of(error: BaseException, model: nn.Module) -> dict[str, Any] | None:
    """The innermost module of ``model`` that an error came through, and the line of its code.

    Returns ``{"module", "type", "file", "line", "code"}``, or None where the error did not come through the model. A line of the model's own
    code goes before one of torch.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Any] | None = None
    for each in _chain(error):
        inside, own = False, False
        for frame, line in traceback.walk_tb(each.__traceback__):
            if str(frame.f_globals.get("__name__")).startswith("diffusionblocks."):
                continue
            module = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
            file = frame.f_code.co_filename
            if (
                isinstance(module, nn.Module)
                and id(module) in names
                and not file.endswith("torch/nn/modules/module.py")
            ):
                inside = True
                found = {**(found or {}), "module": names[id(module)], "type": type(module).__name__}
                if not own:
                    found |= _line(file, line)
            if inside and not file.startswith(TORCH):
                own = True
                found = {**(found or {}), **_line(file, line)}
        if found is not None:
            return found
    return None


def _line(file: str, line: int) -> dict[str, Any]:
    return {"file": file, "line": line, "code": linecache.getline(file, line).strip()}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those it came from, the first of them first."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    yield from reversed(chain)


def trace_error(
    model: nn.Module,
    example: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None,
    input_shape: Sequence[int] | None,
) -> BaseException | None:
    """Export the model once more and give the error this ends in, with its traceback; None where there is none."""
    if example is None:
        if input_shape is None:
            return None
        example = (torch.randn(EXAMPLE_BATCH, *input_shape, generator=torch.Generator().manual_seed(0)),)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = () if isinstance(example, Mapping) else tuple(example)
    shapes: Any = {k: {0: Dim.AUTO} for k in kwargs} if kwargs else tuple({0: Dim.AUTO} for _ in args)
    try:
        with quiet(), torch.no_grad():
            torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        return error
    return None
