"""A dynamic batch from two static captures, for a model that turns the number of rows into a plain number.

torch.export makes the batch a constant where forward does (``torch.tensor([0] * x.shape[0])``, a list of sizes, a cache keyed by the shape). The model is captured
at two numbers of rows then. Where both graphs have the same operators and differ in numbers alone, each number that differs is written as a multiple of the
batch, and each constant tensor whose rows are all equal as one row; the result is exported again with a dynamic batch. Where they have not, loops over the
samples become operators on all of them first (:mod:`rolled`).

Requires: a model that torch.export takes at fixed shapes. Ensures: a program with a dynamic batch, or None; whether it is right at a third number of rows is
for the caller to check.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from diffusionblocks.converter import rolled
from diffusionblocks.converter.rows import same
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)

ROWS = (3, 5)
OTHERS = (1, 2, 7, 17)
"""Numbers of rows that what is found is tried on."""


class _Differs(Exception):
    """The two graphs differ in more than numbers of rows."""


def rebatched(
    model: nn.Module,
    args: Sequence[torch.Tensor],
    kwargs: Mapping[str, torch.Tensor],
    flat: Callable[[ExportedProgram], fx.GraphModule] | None = None,
) -> ExportedProgram | None:
    """The model with a dynamic batch, or None where its two static graphs differ in more than multiples of the batch.

    ``flat``: makes a flat graph without in-place operators; where it is given, loops over the samples may become operators on all of them.
    """
    inputs = [(tuple(_rows(a, n) for a in args), {k: _rows(t, n) for k, t in kwargs.items()}) for n in ROWS]
    try:
        programs = [torch.export.export(model, a, dict(k), strict=False) for a, k in inputs]
    except Exception as error:
        log.debug("no static captures: %s", error)
        return None
    for rolling in (False, True) if flat else (False,):
        try:
            modules: list[fx.GraphModule] = []
            for program, rows, (given, named) in zip(programs, ROWS, inputs, strict=True):
                if rolling and flat:
                    module = flat(_inlined(program))
                    rolled.settle(module, [*given, *named.values()])
                    rolled.roll(module, rows)
                else:
                    module = program.module(check_guards=False)  # type: ignore[assignment]
                modules.append(module)
            unified = _Unifier(*modules).unified()
            dims: Any = {k: {0: Dim("batch", min=1, max=2**16)} for k in kwargs} or tuple(
                {0: Dim("batch", min=1, max=2**16)} for _ in args
            )
            program = torch.export.export(unified, *inputs[0], dynamic_shapes=dims, strict=False)
        except Exception as error:
            log.debug("no dynamic batch from two static ones%s: %s", ", rolled" if rolling else "", error)
            continue
        _copy_modules(unified, program.graph_module)
        if program.range_constraints and _holds(model, program, args, kwargs):
            return program
    return None


def _holds(
    model: nn.Module, program: ExportedProgram, args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor]
) -> bool:
    """Whether the program is the model on numbers of rows that it was not made from."""
    module = program.module()
    for rows in OTHERS:
        given, named = tuple(_rows(a, rows) for a in args), {k: _rows(t, rows) for k, t in kwargs.items()}
        with torch.no_grad():
            try:
                expected = _tensors(model(*(t.clone() for t in given), **{k: t.clone() for k, t in named.items()}))
            except Exception:
                continue  # which the model itself does not take
            try:
                got = _tensors(module(*given, **named))
            except Exception:
                return False
        if len(got) != len(expected) or not all(same(a, b) for a, b in zip(got, expected, strict=True)):
            return False
    return True


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _inlined(program: ExportedProgram) -> ExportedProgram:
    """The program without the regions in which a type of another device is not cast."""
    return program.run_decompositions({}) if any("wrap_with" in str(n.target) for n in program.graph.nodes) else program


def _rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor[torch.arange(rows) % tensor.shape[0]].contiguous()


class _Unifier:
    """Walks two graphs of one model side by side."""

    def __init__(self, first: fx.GraphModule, second: fx.GraphModule) -> None:
        self.first, self.second = first, second
        self.pairs: dict[fx.Node, fx.Node] = {}
        self.batch: fx.Node | None = None
        self.start: fx.Node | None = None

    def unified(self) -> fx.GraphModule:
        """The first graph with the batch in place of its numbers (in place).

        Raises:
            _Differs: the graphs are not the same but for multiples of the batch.
        """
        graph = self.first.graph
        nodes, others = (list(m.graph.nodes) for m in (self.first, self.second))
        if len(nodes) != len(others):
            raise _Differs(f"{len(nodes)} operators against {len(others)}")
        self.start = next(n for n in nodes if n.op not in ("placeholder", "get_attr"))
        source = next(n for n in nodes if n.op == "placeholder" and n.meta["val"].dim())
        with graph.inserting_before(self.start):
            self.batch = graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
        for node, other in zip(nodes, others, strict=True):
            if node.op != other.op or (node.op != "get_attr" and str(node.target) != str(other.target)):
                raise _Differs(f"{node.format_node()} against {other.format_node()}")
            self.pairs[node] = other
            if node.op == "get_attr":
                self._constant(node, other)
            elif node.op == "call_function":
                with graph.inserting_before(node):
                    node.args = self._matched(node.args, other.args)
                    node.kwargs = self._matched(node.kwargs, other.kwargs)
        graph.lint()
        self.first.recompile()
        return self.first

    def _matched(self, one: Any, other: Any) -> Any:
        if isinstance(one, fx.Node):
            if self.pairs.get(one) is not other:
                raise _Differs(f"{one} is read against {other}")
            return one
        if isinstance(one, dict):
            return {key: self._matched(value, other[key]) for key, value in one.items()}
        if isinstance(one, list | tuple):
            if len(one) != len(other):
                raise _Differs(f"{one} against {other}")
            return type(one)(self._matched(a, b) for a, b in zip(one, other, strict=True))
        if type(one) is int and type(other) is int and one != other:
            return self._times(one, other)
        if one != other:
            raise _Differs(f"{one} against {other}")
        return one

    def _times(self, one: int, other: int) -> fx.Node:
        times, rest = divmod(other - one, ROWS[1] - ROWS[0])
        if rest or times < 1 or one != times * ROWS[0]:
            raise _Differs(f"{one} rows against {other}")
        assert self.batch is not None
        return self.batch if times == 1 else self.first.graph.call_function(operator.mul, (self.batch, times))

    def _constant(self, node: fx.Node, other: fx.Node) -> None:
        """A constant of both graphs; one with a row, or as many rows, for each sample becomes those of the first, repeated for the batch."""
        one, two = (operator.attrgetter(str(n.target))(m) for m, n in ((self.first, node), (self.second, other)))
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and one.shape == two.shape:
            if not (one is two or torch.equal(one, two)):
                raise _Differs(f"the constants {node.target} differ")
            return
        if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor) or one.dim() != two.dim():
            raise _Differs(f"the constants {node.target} differ")
        axes = [d for d in range(one.dim()) if one.shape[d] != two.shape[d]]
        sizes = [t.shape[axes[0]] if len(axes) == 1 else 1 for t in (one, two)]
        count, rest = divmod(sizes[0], ROWS[0])
        if len(axes) != 1 or rest or sizes[1] != count * ROWS[1]:
            raise _Differs(f"the constants {node.target} have other shapes")
        row = one.narrow(axes[0], 0, count)
        times = [[rows if d == axes[0] else 1 for d in range(one.dim())] for rows in ROWS]
        if not all(torch.equal(t, row.repeat(n)) for t, n in zip((one, two), times, strict=True)):
            raise _Differs(f"the constants {node.target} hold something else for every sample")
        name = f"{str(node.target).replace('.', '_')}_row"
        self.first.register_buffer(name, row.clone())
        graph = self.first.graph
        with graph.inserting_before(self.start):
            constant = graph.get_attr(name)
            assert self.batch is not None
            if count == 1:
                shape = [self.batch if d == axes[0] else n for d, n in enumerate(one.shape)]
                expanded = graph.call_function(torch.ops.aten.expand.default, (constant, shape))
            else:
                often = [self.batch if d == axes[0] else 1 for d in range(one.dim())]
                expanded = graph.call_function(torch.ops.aten.repeat.default, (constant, often))
        users = [u for u in node.users if u is not expanded]
        for user in users:
            user.replace_input_with(node, expanded)
        self.pairs[expanded] = other


def _copy_modules(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Give the operators of ``target`` the modules that those of ``source`` came from, as far as both are the same sequence."""
    nodes, copies = ([n for n in m.graph.nodes if n.op == "call_function"] for m in (source, target))
    names = [[str(n.target) for n in of] for of in (nodes, copies)]
    for i, j, length in SequenceMatcher(None, names[0], names[1], autojunk=False).get_matching_blocks():
        for node, copy in zip(nodes[i : i + length], copies[j : j + length], strict=True):
            copy.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
