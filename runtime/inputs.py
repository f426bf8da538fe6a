"""A call's inputs compared with what the network takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from diffusionblocks.runtime.errors import InputError
from diffusionblocks.runtime.manifest import TensorSpec
from numpy.typing import NDArray


def checked_inputs(specs: Sequence[TensorSpec], inputs: Any) -> dict[str, NDArray[Any]]:
    """Arrays by name, in the network's types, each with the same number of rows.

    Args:
        specs: what the network takes.
        inputs: an array of the first, or a mapping by name (``x`` stands for the first).

    Raises:
        InputError: names, types, shapes or values that do not fit, with what was expected.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else {specs[0].name: inputs}
    expected = {spec.name for spec in specs}
    if "x" in given and "x" not in expected:
        given[specs[0].name] = given.pop("x")
    if set(given) != expected:
        raise InputError(
            f"The inputs {', '.join(sorted(map(str, given)))} were given; this network takes {', '.join(sorted(expected))}.",
            hint="Give a .npy of the first input, or a .npz (a dict) with those names.",
        )
    values = {spec.name: _checked(spec, given[spec.name]) for spec in specs}
    if len({len(v) for v in values.values()}) != 1:
        raise InputError("The inputs have different numbers of rows.", hint="They must be one batch.")
    return values


def checked_null(specs: Sequence[TensorSpec], null: Mapping[str, Any], rows: int) -> dict[str, NDArray[Any]]:
    """The conditions that guidance leads away from, [1, ...] or [rows, ...] by name; a single number stands for a row.

    Raises:
        InputError: names, types or shapes that do not fit.
    """
    known = {spec.name: spec for spec in specs}
    unknown = sorted(set(null) - set(known))
    if unknown:
        raise InputError(
            f"null names {', '.join(unknown)}; this network's conditions are {', '.join(known) or 'none'}.",
            hint="Name conditions of the network.",
        )
    made = {name: _checked(known[name], np.atleast_1d(np.asarray(value))) for name, value in null.items()}
    wrong = sorted(name for name, value in made.items() if len(value) not in (1, rows))
    if wrong:
        raise InputError(f"null has {len(made[wrong[0]])} rows of {wrong[0]}.", hint=f"Give one, or {rows}.")
    return made


def _whole_numbers(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    made = array.astype(spec.dtype)
    if not ((made == array) & ((made < 0) == (array < 0))).all():
        raise InputError(f"The input {spec.name} holds numbers beyond {spec.dtype}.", hint="Give smaller ones.")
    return made


def _checked(spec: TensorSpec, value: Any) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"The input {spec.name} is no array: {error}", hint="Give rows of equal shapes.") from error
    if array.dtype.kind == "f" and spec.dtype.startswith("float") and str(array.dtype) != spec.dtype:
        with np.errstate(over="ignore"):  # infinity is refused below
            array = array.astype(spec.dtype)
    if array.dtype.kind in "iu" and spec.dtype in ("int32", "int64"):
        array = _whole_numbers(spec, array)
    if str(array.dtype) != spec.dtype:
        raise InputError(
            f"The input {spec.name} has the type {array.dtype}; expected {spec.dtype}.", hint="Convert it."
        )
    if array.ndim != len(spec.shape) or any(
        isinstance(want, int) and want != have for want, have in zip(spec.shape[1:], array.shape[1:], strict=False)
    ):
        shape = ", ".join("N" if i == 0 else str(s) for i, s in enumerate(spec.shape))
        raise InputError(
            f"The input {spec.name} has the shape {array.shape}; expected ({shape}).",
            hint="Reshape or resize the data.",
        )
    if array.shape[0] == 0:
        raise InputError(f"The input {spec.name} holds no rows.", hint="Give at least one.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"The input {spec.name} holds NaN or infinity.", hint="Remove or repair those values.")
    return np.ascontiguousarray(array)
