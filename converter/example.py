"""What is wrong with an example input, by the name of the argument: seen before the model runs, or found after it failed by changing one argument."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusionblocks.converter.saved import one_line
from diffusionblocks.runtime.errors import BadInput
from torch import nn

Tensors = Mapping[str, torch.Tensor]
Example = Sequence[torch.Tensor] | Tensors
OWN = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)


def bind(
    model: nn.Module, example: Example, batch: int
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Positional and keyword arguments for ``model`` with ``batch`` rows each, and the example by name as it was given.

    ``x`` stands for the first argument where ``forward`` has none of that name.

    Raises:
        BadInput: names that ``forward`` does not take or lacks, no or an empty batch, batches that differ, NaN.
    """
    parameters = _parameters(model)
    if isinstance(example, Mapping):
        named = dict(example)
        if "x" in named and parameters and "x" not in parameters and not _open(model):
            named = {next(iter(parameters)) if n == "x" else n: t for n, t in named.items()}
    else:
        names = [*parameters, *(f"argument {i}" for i in range(len(parameters), len(example)))]
        named = dict(zip(names, example, strict=False))
    _check_names(model, parameters, named)
    _check_rows(named)
    rows = {n: t[torch.arange(batch) % t.shape[0]].contiguous() for n, t in named.items()}
    if isinstance(example, Mapping):
        return (), rows, named
    return tuple(rows.values()), {}, named


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        found = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {n: p for n, p in found.items() if p.kind in OWN}


def _open(model: nn.Module) -> bool:
    """Whether ``forward`` takes any name or any number of arguments, or does not say."""
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.kind not in OWN for p in found)


def _check_names(model: nn.Module, parameters: Mapping[str, inspect.Parameter], named: Tensors) -> None:
    unknown = [] if _open(model) else [n for n in named if n not in parameters]
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in named]
    if not unknown and not missing:
        return
    said = [f"has {', '.join(unknown)}, which forward does not take"] if unknown else []
    said += [f"lacks {', '.join(missing)}, which forward needs"] if missing else []
    needed = [n for n, p in parameters.items() if p.default is p.empty]
    others = [n for n in parameters if n not in needed]
    takes = ", ".join(needed) + (f" and may take {', '.join(others)}" if others else "")
    raise BadInput(
        f"The example input {', and '.join(said)}.",
        hint=f"{type(model).__name__} takes {takes}: name the arrays in --example FILE.npz after these, each batch first.",
    )


def _check_rows(named: Tensors) -> None:
    for name, tensor in named.items():
        if tensor.dim() == 0 or tensor.shape[0] == 0:
            raise BadInput(
                f"The example input {name} has {'no batch dimension' if tensor.dim() == 0 else 'a batch of no rows'}.",
                hint="Give every input a leading batch dimension with at least one row.",
            )
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise BadInput(f"The example input {name} holds NaN.", hint="Give numbers the model was made for.")
    if len({t.shape[0] for t in named.values()}) > 1:
        rows = ", ".join(f"{n} has {t.shape[0]}" for n, t in named.items())
        raise BadInput(
            f"The example inputs differ in their batch, the first dimension: {rows} rows.",
            hint="Give as many rows of each; an argument without a batch has to be fixed in a module around the model.",
        )


def failure(model: nn.Module, named: Tensors, given: Tensors, error: Exception) -> BadInput:
    """Why the model fails on an example: the first change of one argument that it runs with, if there is one.

    Args:
        named: the arguments by name, of which it failed on the first rows; ``given``: the same with the rows they came with.
    """
    if len(named) == 1:
        inputs = f"input of shape {', '.join(str(tuple(t.shape)) for t in named.values())}"
    else:
        inputs = "inputs " + ", ".join(f"{n} {tuple(t.shape)} {_name(t.dtype)}" for n, t in named.items())
    message = f"The model fails on the example {inputs}: {type(error).__name__}: {one_line(error, 400)}"
    rows = next((len(t) for t in given.values()), 0)
    if error_of(model, given) is None:
        return BadInput(
            f"{message}\nIt runs on {rows} rows of {', '.join(given)}, but not on any number: that is written into it.",
            hint="Let forward take the number of rows from its inputs (x.shape[0]).",
        )
    for name, tensor in named.items():
        for change, changed in _changes(tensor):
            if error_of(model, {**named, name: changed}) is None:
                return BadInput(f"{message}\nIt runs if {name} {change}.", hint=f"Change {name} in --example FILE.")
    return BadInput(
        message,
        hint="Give the shape it expects with --input-shape, or real inputs with --example FILE.npz: for each argument of forward an array "
        "of the shape and type it expects, batch first.",
    )


def _changes(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    zeros = torch.zeros(tensor.shape, dtype=torch.long)
    if tensor.dtype != torch.float32:
        yield "is float32", tensor.abs().float() if tensor.is_complex() else tensor.float()
    if tensor.dtype in (torch.int64, torch.int32):
        yield "holds smaller integers", torch.zeros_like(tensor)
    elif tensor.dtype != torch.bool:
        yield "holds integers (int64)", zeros
    if tensor.dtype != torch.bool:
        yield "is of booleans", zeros == 0
    for axis in (1, tensor.dim()):
        yield f"has the shape {tuple(tensor.unsqueeze(axis).shape)}", tensor.unsqueeze(axis)


def error_of(model: nn.Module, named: Tensors) -> Exception | None:
    """What the model raises on arguments given by name, or None."""
    parameters = _parameters(model)
    try:
        with torch.no_grad():
            if set(named) <= set(parameters) or _open(model):
                model(**{n: t.clone() for n, t in named.items()})
            else:
                model(*(t.clone() for t in named.values()))
    except Exception as error:
        return error
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
