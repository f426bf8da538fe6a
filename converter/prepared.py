"""A denoiser made ready to be captured: its example inputs, and what is no tensor with a batch fixed in a module around it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusionblocks.converter.saved import one_line
from diffusionblocks.converter.source import Source
from diffusionblocks.converter.trial import Outcome, Search, Trial, arguments
from diffusionblocks.runtime.errors import BadInput
from torch import nn

log = logging.getLogger(__name__)


def prepare(source: Source, config: Mapping[str, Any]) -> Source:
    """The source with example inputs, and its module in a :class:`Prepared` where some arguments are no inputs.

    Where no inputs are found the module stays as it is, and ``no_example`` says why.
    """
    model = source.model
    assert isinstance(model, nn.Module)
    search = Search(model, config)
    trial, outcome = search.best()
    if outcome.error is not None:
        return replace(source, no_example=_refusal(search, trial, outcome))
    values = search.values(trial)
    example = {n: v for n, v in values.items() if not trial.forms[n].fixed}
    sizes = ", ".join(f"{n} {'x'.join(map(str, t.shape[1:])) or 'one number'}" for n, t in example.items())
    log.warning(
        "%s: made for inputs of these sizes, batch left out: %s (--example FILE.npz for others)", source.name, sizes
    )
    if len(example) == len(values) and not trial.entries and not any(f.layers for f in trial.forms.values()):
        return replace(source, example=example)
    return replace(source, model=Prepared(model, values, trial).eval(), example=example)


def _refusal(search: Search, trial: Trial, outcome: Outcome) -> BadInput:
    unknown, names = search.unknown(), search.parameters
    error = outcome.error
    assert error is not None
    if unknown:
        why = f"it needs {', '.join(unknown)}, which its config does not describe."
    else:
        read = [n for n in names if n in outcome.words] or list(trial.forms)
        why = f"it stops where it reads {', '.join(read)}: {type(error).__name__}: {one_line(error)}"
    return BadInput(
        f"No example inputs for {type(search.model).__name__} could be made: {why}",
        hint="Give them: --example FILE.npz, with arrays named after forward's arguments, batch first "
        f"({', '.join(n for n, p in names.items() if p.default is p.empty)}, ...). An argument that is no array has to be fixed "
        "in a module around the model: give that as package.module:factory.",
    )


class _Forward:
    """The ``forward`` of a :class:`Prepared`, with the arguments' names in its signature, where torch.export reads them."""

    def __get__(self, module: Prepared | None, owner: type | None = None) -> Callable[..., Any]:
        if module is None:
            return Prepared.run

        def forward(*args: Any, **given: Any) -> Any:
            return module.run(**inspect.signature(forward).bind_partial(*args, **given).arguments)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind, default=None) for n in module.names])  # type: ignore[attr-defined]
        return forward


class Prepared(nn.Module):
    """A model called with tensors by name, batch first: other arguments are fixed, unless they are given.

    ``names``: the model's arguments, and those that it takes as entries of a dict. Tensors that are fixed are buffers and not saved.
    """

    forward = _Forward()

    def __init__(self, model: nn.Module, values: Mapping[str, Any], trial: Trial) -> None:
        super().__init__()
        self.model, self.trial = model, trial
        own = [n for n in inspect.signature(model.forward).parameters if n not in trial.entries.values()]
        self.names = list(dict.fromkeys([*values, *own]))
        self.fixed = {n: v for n, v in values.items() if trial.forms[n].fixed and not isinstance(v, torch.Tensor)}
        self.tables = [n for n, v in values.items() if trial.forms[n].fixed and isinstance(v, torch.Tensor)]
        for name in self.tables:
            self.register_buffer(f"fixed_{name}", values[name], persistent=False)

    def run(self, **given: Any) -> Any:
        fixed = {**self.fixed, **{n: getattr(self, f"fixed_{n}") for n in self.tables}}
        return self.model(**arguments({**fixed, **given}, self.trial))
