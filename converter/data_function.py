"""Data that a function of the user makes: ``package.module:function``, called without arguments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusionblocks.converter.data import name_first
from diffusionblocks.converter.dataset import Batch, Dataset
from diffusionblocks.converter.saved import one_line
from diffusionblocks.converter.stored import ModelArrays, check_inputs
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

WANTED = "a mapping of arrays by input name (y the targets), a tuple of the inputs and perhaps y, or an object with names, class_names, fingerprint, len() and batch(rows)"
_NEEDED = ("names", "class_names", "fingerprint", "batch", "__len__")


class Named:
    """A user's dataset whose failures say where they come from."""

    def __init__(self, data: Dataset, spec: str, *, labelled: bool | None) -> None:
        self.data, self.spec, self.labelled = data, spec, labelled
        self.names, self.fingerprint = tuple(data.names), str(data.fingerprint)
        self.class_names = None if data.class_names is None else tuple(data.class_names)

    def __len__(self) -> int:
        return len(self.data)

    def row_name(self, row: int) -> str:
        name = getattr(self.data, "row_name", None)
        return str(name(row)) if callable(name) else f"row {row}"

    def batch(self, rows: Sequence[int]) -> Batch:
        try:
            found = self.data.batch(rows)
            inputs, targets = dict(found.inputs), found.targets
        except BadInput:
            raise
        except Exception as error:
            first = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows from row {rows[0] if len(rows) else 0}"
            raise BadInput(
                f"{self.spec}: batch() failed for {first}: {type(error).__name__}: {one_line(error)}",
                hint="Mend it; for a row that cannot be read it is to raise BadInput.",
            ) from error
        return Batch(inputs, None if self.labelled is False else targets)


def from_function(spec: str, specs: Sequence[TensorSpec], labelled: bool | None) -> Dataset:
    """What the function returns, as a dataset.

    Raises:
        BadInput: it cannot be imported, fails, or returns what is no data for this model.
    """
    made = _called(spec)
    if isinstance(made, Mapping):
        arrays = {str(name): _array(spec, value) for name, value in made.items()}
    elif isinstance(made, tuple | list):
        names = [s.name for s in specs]
        if len(made) not in (len(names), len(names) + 1):
            raise BadInput(
                f"{spec}() returned {len(made)} arrays; the model takes {len(names)} inputs ({', '.join(names)}).",
                hint=f"Return {WANTED}.",
            )
        arrays = {n: _array(spec, v) for n, v in zip([*names, "y"], made, strict=False)}
    elif isinstance(made, np.ndarray | torch.Tensor):
        arrays = {specs[0].name: _array(spec, made)}
    else:
        return _dataset(spec, made, specs, labelled)
    targets = None if any(s.name == "y" for s in specs) else arrays.pop("y", None)
    _require_targets(spec, labelled, targets)
    return ModelArrays(name_first(arrays, specs[0].name), None if labelled is False else targets, specs)


def _called(spec: str) -> Any:
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:
        raise BadInput(
            f"{spec} is no file, and cannot be imported: {type(error).__name__}: {one_line(error)}",
            hint="Give a path, or package.module:function, importable from here (PYTHONPATH).",
        ) from error
    finally:
        sys.path.remove("")
    try:
        return function()
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{spec}() failed: {type(error).__name__}: {one_line(error)}", hint="It must work without arguments."
        ) from error


def _array(spec: str, value: Any) -> np.ndarray[Any, Any]:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind not in "biufc" or not array.ndim:
        raise BadInput(f"{spec}() returned an array of {array.dtype} {list(array.shape)}.", hint=f"Return {WANTED}.")
    return array


def _dataset(spec: str, made: Any, specs: Sequence[TensorSpec], labelled: bool | None) -> Dataset:
    missing = [name for name in _NEEDED if not hasattr(made, name)]
    if missing:
        raise BadInput(
            f"{spec}() returned a {type(made).__name__} without {', '.join(missing)}.", hint=f"Return {WANTED}."
        )
    if set(made.names) != {s.name for s in specs}:
        raise BadInput(
            f"{spec}() returned data with the inputs {', '.join(made.names)}; the model takes {', '.join(s.name for s in specs)}.",
            hint="Name them after forward's arguments.",
        )
    data = Named(made, spec, labelled=labelled)
    if len(data):
        try:
            batch = data.batch([0])
        except BadInput as error:
            if error.__cause__ is not None:
                raise
            return data  # a bad row, as the dataset says: reading all rows will count it
        check_inputs(batch.inputs, specs)
        _require_targets(spec, labelled, batch.targets)
    return data


def _require_targets(spec: str, labelled: bool | None, targets: Any) -> None:
    if labelled and targets is None:
        raise BadInput(f"{spec}() returned no targets.", hint=f"Return {WANTED}, or train with --targets teacher.")
