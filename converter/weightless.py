"""A model's architecture without its weights: built on torch's meta device where it can be, and captured there.

Nothing of a weight is allocated, so that a network of any size is captured in the time its layers take. A file of weights is read as always (mapped), and so
is a model that asks for numbers while it is built; ``note`` says so then.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter import tracing
from diffusionblocks.converter.capture import EXAMPLE_BATCH, Captured, capture
from diffusionblocks.converter.diffusion import is_diffusers_folder
from diffusionblocks.converter.load import load_model
from diffusionblocks.converter.saved import one_line
from diffusionblocks.converter.source import Source
from diffusionblocks.converter.specs import architecture
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

log = logging.getLogger(__name__)

LENGTH = 16
"""Tokens of an example for a language model, where no shape is given."""


@dataclass(frozen=True)
class Weightless:
    """A model captured: ``captured`` holds its parameters, on the meta device unless ``note`` says that they had to be made."""

    name: str
    captured: Captured
    note: str | None


class OnMeta(TorchFunctionMode):
    """Whatever is made meanwhile without a device is made on the meta device, random numbers (of which there are none) without a generator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = "meta"
            kwargs.pop("generator", None)
        return func(*args, **kwargs)


def load_weightless(
    model: str | nn.Module | ExportedProgram,
    *,
    arch: str | None = None,
    trust: Sequence[str] = (),
    allow_pickle: bool = False,
    input_shape: Sequence[int] | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
) -> Weightless:
    """MODEL's captured graph.

    Args:
        model: a path or spec as for :func:`load.load_model` (of a folder its config alone is read), or a module.
        arch: architecture of a file of weights; trust, allow_pickle: how a pickle is read.
        input_shape: shape of the first input, batch left out: of numbers, or of tokens where the model takes tokens.
        example: inputs by name, batch first; of which the shapes and types alone are used.

    Raises:
        BadInput: no such model, no inputs are known, or it cannot be captured.
    """
    if not isinstance(model, str):
        return _captured(Source("module", type(model).__name__, model), input_shape, example, None)
    spec = _spec_of(model)
    if spec is None:
        source = load_model(model, arch=arch, trust=trust, allow_pickle=allow_pickle)
        return _captured(source, input_shape, example, None)
    try:
        with OnMeta(), _quiet():
            source = architecture(spec)
        return _captured(source, input_shape, example, None)
    except Exception as error:
        log.debug("%s is built with weights: %s", spec, error)
        reason = one_line(error, 160)
    source = architecture(spec)
    note = f"{spec} could not be captured without weights ({reason}): random ones were made."
    return _captured(source, input_shape, example, note)


def _spec_of(model: str) -> str | None:
    """The spec that builds MODEL's architecture alone; None for a file."""
    path = Path(model)
    if path.is_dir():
        return f"{'diffusers' if is_diffusers_folder(path) else 'transformers'}:{model}"
    return model if ":" in model and not path.exists() else None


def _captured(
    source: Source, shape: Sequence[int] | None, example: Mapping[str, torch.Tensor] | None, note: str | None
) -> Weightless:
    model = source.model
    if isinstance(model, ExportedProgram):
        return Weightless(source.name, capture(model), note)
    inputs = example or _inputs(source, shape)
    meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    if not meta:
        given = tuple(inputs.values()) if set(inputs) == {"x"} else inputs
        return Weightless(source.name, capture(model, given), note)
    program = _export(model, {n: torch.empty_like(_rows(t), device="meta") for n, t in inputs.items()})
    return Weightless(source.name, capture(program), note)


def _inputs(source: Source, shape: Sequence[int] | None) -> dict[str, torch.Tensor]:
    """Example inputs by name, ``x`` for the one of a known shape."""
    known = dict(source.example or {})
    if not known and _takes_tokens(source.model):
        names = ["input_ids"] + ["decoder_input_ids"] * bool(source.model.config.is_encoder_decoder)  # type: ignore[union-attr]
        known = {name: torch.ones(EXAMPLE_BATCH, LENGTH, dtype=torch.long) for name in names}
    if known and shape is not None:
        first = next(iter(known.values())).shape
        return {
            n: torch.ones(EXAMPLE_BATCH, *shape, dtype=t.dtype) if t.shape == first else t for n, t in known.items()
        }
    if known:
        return known
    shape = shape or source.input_shape
    if shape is None:
        raise source.no_example or BadInput(
            "The shape of the model's input is not known.",
            hint="Give --input-shape 3x224x224 (batch left out) or --example FILE (.npy or .npz).",
        )
    return {"x": torch.zeros(EXAMPLE_BATCH, *shape)}


def _takes_tokens(model: Any) -> bool:
    return getattr(model, "main_input_name", None) == "input_ids" and hasattr(
        getattr(model, "config", None), "vocab_size"
    )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(EXAMPLE_BATCH, *tensor.shape[1:])


def _export(model: nn.Module, inputs: dict[str, torch.Tensor]) -> ExportedProgram:
    """The exported program of a model on the meta device, with a dynamic batch."""
    positional = set(inputs) == {"x"}
    args, kwargs = (tuple(inputs.values()), {}) if positional else ((), inputs)
    causes: list[str] = []
    model.eval()
    for spec in (Dim("batch", min=1, max=2**16), Dim.AUTO):
        shapes: Any = tuple({0: spec} for _ in args) if positional else {n: {0: spec} for n in inputs}
        try:
            with _quiet(), tracing.settled(model):
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            causes.append(one_line(error, 400))
    raise BadInput(
        f"The model cannot be captured by torch.export: {causes[-1]}",
        hint="`dbconvert inspect` says where, and what can be done.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """torch prints the graph it had so far where an export fails; random weights need no warning where there are none."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
