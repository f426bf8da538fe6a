"""Example inputs for a model that nobody described, found by running it.

It starts from the arguments that ``forward`` requires and, while the model fails, changes one thing: a width that a layer refused, an argument that the
failing line reads and that is None, another form of an argument. A change is kept if the model gets further: more of its layers run, or a later line of
``forward`` is reached. What never ran although it has parameters is tried last, with the arguments that were left out.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusionblocks.converter.arguments import BATCH, ENTRIES, MAIN, WIDTHS, Form, Sizes, forms_of, make
from diffusionblocks.converter.rows import same
from torch import nn
from torch.utils import _pytree as pytree

RUNS, CORRECTIONS = 300, 16
CONDITIONS = ("encoder_hidden_states", "timestep")
WORD = r"[A-Za-z_]\w*"


class Misfit(Exception):
    """A layer was given ``got`` features where it takes ``expected``."""

    def __init__(self, layer: nn.Module, got: int, expected: int) -> None:
        super().__init__(f"{type(layer).__name__} takes {expected} features and was given {got}")
        self.got, self.expected = got, expected


@dataclass(frozen=True)
class Trial:
    """Arguments to run with: the form of each, its width, and which of them are entries of an argument that is a dict."""

    forms: Mapping[str, Form]
    widths: Mapping[str, int]
    entries: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How far a run got: layers run in all, those that ran, the line of ``forward``; and, where it failed, the error, the words of the lines it
    passed in the model's own methods, and names of what may be lacking: what is None on the last line, and what is quoted there or in the error."""

    calls: int
    ran: frozenset[int]
    line: int = 0
    error: Exception | None = None
    words: frozenset[str] = frozenset()
    named: tuple[str, ...] = ()
    output: tuple[torch.Tensor, ...] = ()

    def further_than(self, other: Outcome) -> bool:
        if self.error is None or other.error is None:
            return self.error is None and other.error is not None
        return (self.calls, self.line) > (other.calls, other.line)


class Search:
    """The search for the inputs of ``model``, whose sizes its ``config`` tells in part."""

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self.model, self.config = model, config
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.parameters = {n: p for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds}
        self.main = next(iter(self.parameters), "")
        self.sizes = Sizes(config, list(self.parameters))
        self.layers = {m for m in model.modules() if not any(m.children()) and any(True for _ in m.parameters())}
        self.runs = 0

    def best(self) -> tuple[Trial, Outcome]:
        """The fewest arguments the model runs on, or the trial that got furthest."""
        furthest: tuple[Trial, Outcome] = Trial({}, {}), Outcome(-1, frozenset(), error=TypeError("forward names none"))
        for layout in MAIN if self.main else ():
            trial = Trial({self.main: layout}, {self.main: self.sizes.channels()})
            for name in self._required():
                trial = self._with(trial, name) or trial
            trial, outcome = self._climb(trial)
            if outcome.error is None:
                return self._reach(trial, outcome)
            if outcome.further_than(furthest[1]):
                furthest = trial, outcome
        return furthest

    def unknown(self) -> list[str]:
        """Required arguments that there is no way to make."""
        return [n for n in self._required() if not forms_of(n, MAIN[0], self.config)]

    def values(self, trial: Trial) -> dict[str, Any]:
        """A value for each argument of a trial, in the order of ``forward``."""
        tokens = trial.forms[self.main].axes[:1] == ("tokens",)
        found = {}
        for name, made in trial.forms.items():
            dims = [trial.widths[name] if a == "channels" else self.sizes.of(a, name, tokens) for a in made.axes]
            found[name] = make(made, dims, self.config.get(name))
        order = list(self.parameters)
        return dict(sorted(found.items(), key=lambda item: order.index(trial.entries.get(item[0], item[0]))))

    def _required(self) -> list[str]:
        return [n for n, p in self.parameters.items() if p.default is p.empty and n != self.main]

    def _with(self, trial: Trial, name: str, entry_of: str | None = None) -> Trial | None:
        """The trial with one more argument, or None where there is no way to make it."""
        forms = forms_of(name, trial.forms[self.main], {} if entry_of else self.config)
        if not forms or name in trial.forms:
            return None
        width = WIDTHS[1 + len(trial.forms) % (len(WIDTHS) - 1)]
        entries = trial.entries if entry_of is None else {**trial.entries, name: entry_of}
        return Trial({**trial.forms, name: forms[0]}, {**trial.widths, name: width}, entries)

    # --- one run ---

    def _run(self, trial: Trial) -> Outcome:
        self.runs += 1
        ran: list[int] = []

        def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                _check(layer, args[0])
            ran.append(id(layer))

        handles = [layer.register_forward_pre_hook(before) for layer in self.layers]
        try:
            with torch.no_grad():
                values = self.values(trial)
                output = _tensors(self.model(**arguments(values, trial)))
                outcome = Outcome(len(ran), frozenset(ran), output=output)
                _check_rows(output, _tensors(self.model(**arguments(_rows(values, trial, BATCH - 1), trial))))
        except Exception as error:
            return self._failed(error, ran)
        finally:
            for handle in handles:
                handle.remove()
        return outcome

    def _failed(self, error: Exception, ran: list[int]) -> Outcome:
        line, read = 0, ""
        last: tuple[str, Mapping[str, Any]] = ("", {})
        step = error.__traceback__
        while step is not None:
            code, values = step.tb_frame.f_code, step.tb_frame.f_locals
            first, end, *_ = list(code.co_positions())[step.tb_lasti // 2]
            first = first or step.tb_lineno
            source = "".join(linecache.getline(code.co_filename, n) for n in range(first, (end or first) + 1))
            if values.get("self") is self.model and not code.co_filename.startswith(nn.__path__[0]):
                read, line = read + source, first if code.co_name == "forward" else line
            last, step = (source, values), step.tb_next
        error.__traceback__ = None  # it holds every tensor of the run
        absent = [w for w in re.findall(WORD, last[0]) if w in last[1] and last[1][w] is None]
        quoted = re.findall(rf"[`'\"]({WORD})[`'\"]", f"{error} {read}")
        words = frozenset(re.findall(WORD, read))
        return Outcome(len(ran), frozenset(ran), line, error, words, tuple(dict.fromkeys([*absent, *quoted])))

    # --- what to change ---

    def _settled(self, trial: Trial) -> tuple[Trial, Outcome]:
        """The trial with widths as the layers want them and with the arguments that an error names, and how far it gets."""
        outcome = self._run(trial)
        for _ in range(CORRECTIONS):
            error = outcome.error
            if error is None:
                break
            named = self._named(trial, outcome)
            if named is not None:
                trial, outcome = named, self._run(named)
                continue
            for corrected in _corrections(trial, error):
                after = self._run(corrected)
                if after.further_than(outcome):
                    trial, outcome = corrected, after
                    break
            else:
                break
        return trial, outcome

    def _named(self, trial: Trial, outcome: Outcome) -> Trial | None:
        """The trial with an entry of an argument that is a dict, where the failure names one."""
        entries_of = next((n for n, f in trial.forms.items() if f.kind == "empty"), None)
        if entries_of is None:
            return None
        names = [n for n in outcome.named if n in ENTRIES and n not in trial.forms]
        return next((t for n in names if (t := self._with(trial, n, entries_of)) is not None), None)

    def _pruned(self, trial: Trial, outcome: Outcome) -> Trial:
        """Without what the model does as well without."""
        kept = (self.main, *CONDITIONS, *self._required())
        for name in [n for n in trial.forms if n not in kept]:
            without = replace(
                trial,
                forms={n: f for n, f in trial.forms.items() if n != name},
                entries={n: of for n, of in trial.entries.items() if n != name},
            )
            after = self._run(without)
            if after.error is None and after.ran >= outcome.ran:
                trial = without
        return trial

    def _changes(self, trial: Trial, outcome: Outcome) -> Iterator[Trial]:
        """What may help, likeliest first: arguments that the failing line lacks, other forms of those it has, then any other argument or form."""
        read = [n for n in self.parameters if n in outcome.words or n in outcome.named]
        lacking = [n for n in read if not self.parameters[n].default]
        yield from self._added(trial, lacking)
        together = trial
        for name in lacking:
            together = self._with(together, name) or together
        if len(together.forms) > len(trial.forms) + 1:
            yield together
        for name in sorted(trial.forms, key=lambda n: n not in read):
            alike = {n for n, f in trial.forms.items() if f == trial.forms[name] and n != self.main}
            for changed in self._reformed(trial, name) if name != self.main else ():
                yield changed
                if len(alike) > 1:
                    form = changed.forms[name]
                    yield replace(trial, forms={n: form if n in alike else f for n, f in trial.forms.items()})
        yield from self._added(trial, (n for n in self.parameters if n not in lacking))

    def _added(self, trial: Trial, names: Iterable[str]) -> Iterator[Trial]:
        """The trial with each of the arguments in its likeliest form, then in its others."""
        added = {name: with_it for name in names if (with_it := self._with(trial, name)) is not None}
        yield from added.values()
        for name, with_it in added.items():
            yield from self._reformed(with_it, name)

    def _reformed(self, trial: Trial, name: str) -> Iterator[Trial]:
        for other in forms_of(name, trial.forms[self.main], self.config):
            if other != trial.forms[name]:
                yield replace(trial, forms={**trial.forms, name: other})

    def _climb(self, trial: Trial) -> tuple[Trial, Outcome]:
        trial, outcome = self._settled(trial)
        while outcome.error is not None and self.runs < RUNS:
            for change in self._changes(trial, outcome):
                changed, after = self._settled(change)
                if after.further_than(outcome):
                    trial, outcome = changed, after
                    break
            else:
                break
        return trial, outcome

    def _reach(self, trial: Trial, outcome: Outcome) -> tuple[Trial, Outcome]:
        """With the arguments that make layers run which did not, and the text and the time even where layers run without."""
        for name in self.parameters:
            for added in self._added(trial, [name]):
                condition = name in CONDITIONS
                if not condition and len(outcome.ran) == len(self.layers):
                    continue
                changed, after = self._settled(added)
                if after.error is not None:
                    continue
                if len(after.ran) > len(outcome.ran) or (condition and _differ(after.output, outcome.output)):
                    trial, outcome = changed, after
                    break
        return self._pruned(trial, outcome), outcome


def _differ(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(a, b, strict=False))


def arguments(values: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """The values as ``forward`` takes them: entries in their dict, layers in their list."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        given = list(value.unbind(1)) if name in trial.forms and trial.forms[name].layers else value
        if name in trial.entries:
            found[trial.entries[name]] = {**found.get(trial.entries[name], {}), name: given}
        else:
            found.setdefault(name, given)
    return found


def _rows(values: Mapping[str, Any], trial: Trial, rows: int) -> dict[str, Any]:
    return {n: v if trial.forms[n].fixed else v[:rows] for n, v in values.items()}


def _tensors(output: Any) -> tuple[torch.Tensor, ...]:
    return tuple(x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))


def _check_rows(output: tuple[torch.Tensor, ...], fewer: tuple[torch.Tensor, ...]) -> None:
    """Refuse inputs of which the model mixes the samples: an axis was taken for the batch, or the batch for an axis."""
    for whole, some in zip(output, fewer, strict=True):
        if whole.dim() == 0 or whole.shape[0] != BATCH:
            raise ValueError(f"an output of shape {tuple(whole.shape)} has no batch of {BATCH}")
        if whole[: BATCH - 1].shape != some.shape or not same(whole[: BATCH - 1], some):
            raise ValueError("a sample's output depends on the other samples")


def _check(layer: nn.Module, x: torch.Tensor) -> None:
    """Say which number does not fit, where the layer's own error would not."""
    if isinstance(layer, nn.Linear):
        axis, expected = x.dim() - 1, layer.in_features
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        axis, expected = 1, layer.in_channels
        if x.dim() != layer.weight.dim():
            raise ValueError(
                f"{type(layer).__name__} was given {x.dim()} dimensions"
            )  # torch takes the batch for channels
    else:
        return
    if x.shape[axis] != expected:
        raise Misfit(layer, x.shape[axis], expected)


def _corrections(trial: Trial, error: Exception) -> Iterator[Trial]:
    """Other widths: those that account for the number a layer refused, alone, repeated or beside each other; or any that the error mentions."""
    wide = [n for n, f in trial.forms.items() if "channels" in f.axes]
    if isinstance(error, Misfit):
        got, expected = error.got, error.expected
        for name in wide:
            times, rest = divmod(got, trial.widths[name])
            if times and not rest and expected % times == 0:
                yield _widened(trial, name, expected // times)
        for name, other in itertools.permutations(wide, 2):
            if trial.widths[name] + trial.widths[other] == got and expected > trial.widths[name]:
                yield _widened(trial, other, expected - trial.widths[name])
        for name in wide:
            if expected > got - trial.widths[name] > 0:
                yield _widened(trial, name, expected - got + trial.widths[name])
        return
    numbers = list(dict.fromkeys(int(n) for n in re.findall(r"\d+", str(error)[:500])))
    for name in wide:
        if trial.widths[name] in numbers:
            yield from (_widened(trial, name, n) for n in numbers if 0 < n != trial.widths[name])


def _widened(trial: Trial, name: str, width: int) -> Trial:
    return replace(trial, widths={**trial.widths, name: width})
