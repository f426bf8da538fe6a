"""A PyTorch model, captured once as a flat torch.fx graph of ATen operators.

Capture is ``torch.export`` (non-strict) with a dynamic batch: its graph keeps the original parameters (same storage,
same names), and every node knows the module it came from. What the other passes rely on, and this one ensures:

* placeholders are the model's tensor inputs, flat, in the order of ``forward``; the output is a flat tuple of tensors;
* no guard, assertion or pytree machinery is left;
* no operator overwrites a tensor (``functional``);
* ``view`` is written ``reshape`` (a view recorded on the layout of a fused attention cannot be replayed on another), no squeeze does nothing, and ``type_as`` is a cast;
* the first dimension of every input is the batch, and is symbolic.
"""

from __future__ import annotations

import io
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusionblocks.converter import constants, control_flow, flex, tracing
from diffusionblocks.converter.example import bind, error_of, failure
from diffusionblocks.converter.functional import NotLocal, replace_copies, replace_in_place
from diffusionblocks.converter.rebatch import rebatched
from diffusionblocks.converter.rows import check_rows, same
from diffusionblocks.runtime.errors import BadInput
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)

EXAMPLE_BATCH = 3
"""Batch of the example: torch.export turns a batch of 1 into a constant."""


@dataclass(frozen=True)
class Captured:
    """A model as a flat graph, and the program it came from (which can be saved).

    ``graph``: the flat GraphModule; ``program``: the ExportedProgram; ``input_names``: ``forward``'s argument names, in
    the order of the placeholders; ``example``: one tensor per placeholder, batch :data:`EXAMPLE_BATCH`; ``expected``: what the model itself made of
    its first ``rows`` (empty for a program); ``notes``: what the user must know of it.
    """

    graph: fx.GraphModule
    program: ExportedProgram
    input_names: tuple[str, ...]
    example: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows of the example ``expected`` is of: one, or all."""
        first = next((t for t in self.expected if t.dim()), None)
        return 1 if first is not None and first.shape[0] == 1 else EXAMPLE_BATCH


@flex.plain()
def capture(
    model: nn.Module | ExportedProgram,
    example: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    *,
    input_shape: Sequence[int] | None = None,
) -> Captured:
    """Capture ``model`` in eval mode with a dynamic batch.

    Args:
        model: a module, or a program exported with a dynamic first dimension.
        example: example inputs, batch first: positional tensors or a mapping from argument names.
        input_shape: shape of the one float32 input without its batch, used where ``example`` is not given.

    Raises:
        BadInput: no inputs are known, the model fails on them, or it cannot be captured; says why and what to do.
    """
    if isinstance(model, ExportedProgram):
        return _from_program(model)
    if example is None:
        if input_shape is None:
            raise BadInput(
                "The shape of the model's input is not known.",
                hint="Give --input-shape 3x224x224 (batch left out) or --example FILE (.npy or .npz).",
            )
        example = (torch.randn(EXAMPLE_BATCH, *input_shape, generator=torch.Generator().manual_seed(0)),)
    args, kwargs, given = bind(model, example, EXAMPLE_BATCH)
    model.eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        named = kwargs or dict(zip(given, args, strict=True))
        try:
            expected = _expected(model, args, kwargs)
        except Exception as error:
            raise failure(model, named, given, error) from error
        try:
            with tracing.watched() as asking:
                captured, program = _capture_either_way(model, args, kwargs, asking)
        except Exception:
            error_on_all = error_of(model, named)  # one row may have been broadcast
            if error_on_all is None:
                raise
            raise failure(model, named, given, error_on_all) from error_on_all
        if asking and not captured.notes:
            captured, program = _as_it_is(model, captured, args, kwargs) or (captured, program)
        captured = replace(captured, expected=expected)
        if not captured.notes:
            captured = _of_any_number_of_rows(model, captured, program, args, kwargs)
        if not _is_equal(captured):
            captured = replace(captured, expected=_expected(model, args, kwargs, EXAMPLE_BATCH))
            if not _is_equal(captured):
                raise BadInput(
                    "The captured graph computes something else than the model on the example input.",
                    hint="Usual causes: random numbers in forward, or a state that forward changes. Remove them from the model.",
                )
            note = "On a batch of one the model computes something else than its captured graph (a squeeze, or a branch on the batch?)."
            log.warning(note)
            captured = replace(captured, notes=(*captured.notes, note))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return captured


def _of_any_number_of_rows(
    model: nn.Module,
    captured: Captured,
    program: ExportedProgram,
    args: tuple[torch.Tensor, ...],
    kwargs: dict[str, torch.Tensor],
) -> Captured:
    """What was captured, if it holds for other batches; else what two batches of fixed sizes make of it.

    Raises:
        BadInput: neither holds.
    """
    values = dict(zip(captured.input_names, captured.example, strict=True))
    try:
        check_rows(model, program, captured.graph, values, positional=not kwargs)
    except BadInput:
        with _quiet(), tracing.settled(model):
            again = rebatched(model, args, kwargs, _flat)
        if again is None:
            raise
        made = _from_program(again)
        other = replace(captured, graph=made.graph, program=made.program)
        for asked in (program, again):  # what the first graph was asked for may hold no more
            check_rows(model, asked, other.graph, values, positional=not kwargs)
        return other
    return captured


def _flat(program: ExportedProgram) -> fx.GraphModule:
    return _functional(program)[1]


def _capture(
    model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
) -> tuple[Captured, ExportedProgram]:
    program, notes = _export_or_chain(model, args, kwargs)
    captured = _from_program(program)
    values = kwargs if kwargs else dict(zip(captured.input_names, args, strict=True))
    return replace(captured, example=tuple(values[n] for n in captured.input_names), notes=notes), program


def _capture_either_way(
    model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], asking: list[str]
) -> tuple[Captured, ExportedProgram]:
    """As a model that knows it is exported; where it cannot be, and asked, as one that does not."""
    try:
        return _capture(model, args, kwargs)
    except BadInput:
        for tensors in (False, True) if asking else ():
            again = _capture_unnoticed(model, args, kwargs, tensors)
            if again is not None:
                return again
        raise


def _capture_unnoticed(
    model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], tensors: bool = False
) -> tuple[Captured, ExportedProgram] | None:
    """The model captured without its notice; None where that is refused."""
    try:
        with tracing.unnoticed(tensors):
            return _capture(model, args, kwargs)
    except BadInput:
        return None


def _as_it_is(
    model: nn.Module, captured: Captured, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
) -> tuple[Captured, ExportedProgram] | None:
    """The model captured without its notice, where it otherwise computes something else (if only in the last bit) and that is cured by it."""
    if _to_the_bit(model, captured, args, kwargs):
        return None
    again = _capture_unnoticed(model, args, kwargs)
    return again if again is not None and _to_the_bit(model, again[0], args, kwargs) else None


def _to_the_bit(
    model: nn.Module, captured: Captured, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
) -> bool:
    """Whether the graph is the model on the example, on its first row, and on both with their last dimension turned (the last digits may agree by chance)."""

    def turned(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(t.roll(1, -1) if t.dim() > 1 else t for t in tensors)

    other = dict(zip(kwargs, turned(kwargs.values()), strict=True))
    for given, named, example in ((args, kwargs, captured.example), (turned(args), other, turned(captured.example))):
        for rows in (1, EXAMPLE_BATCH):
            try:
                expected = _expected(model, given, named, rows)
            except Exception:
                continue  # boxes whose corners are turned, say
            if not _is_equal(replace(captured, example=example, expected=expected), torch.equal):
                return False
    return True


def _expected(
    model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], rows: int = 1
) -> tuple[torch.Tensor, ...]:
    """What the model makes of the example's first row, since of a large model each costs seconds; of all where it does not take one."""
    with torch.no_grad():
        try:
            output = model(*(a[:rows].clone() for a in args), **{n: t[:rows].clone() for n, t in kwargs.items()})
        except Exception:
            output = model(*(a.clone() for a in args), **{n: t.clone() for n, t in kwargs.items()})
    return tuple(x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))


def _is_equal(captured: Captured, equal: Callable[[torch.Tensor, torch.Tensor], bool] = same) -> bool:
    """Whether the graph computes what the model did on the example's first rows; not so for a model with a state, or a wrong capture."""
    rows = captured.rows
    with torch.no_grad():
        got = captured.graph(*(t[:rows].clone() for t in captured.example))
    return all(equal(a, b) for a, b in zip(got, captured.expected, strict=False))


def _one_line(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _export_or_chain(
    model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The exported model; where it decides by its tensors' values, the chain of its layers, if that is all it decides between."""
    try:
        return _export(model, args, kwargs), ()
    except BadInput as refused:
        decisions = control_flow.decisions_of(model, (args, kwargs))
        if not decisions:
            raise
        chain = control_flow.chain_of(model, (args, kwargs))
        sound = [d for d in decisions if d.constant] if chain is None else chain.replayable
        notes = (chain.note(),) if chain is not None and chain.between else ()
        known = {(d.file, d.line) for d in sound}
        idle = control_flow.idle(model, (args, kwargs), [d for d in decisions if (d.file, d.line) not in known])
        try:
            with control_flow.replayed(model, sound, idle):
                program = _export(model, args, kwargs)
        except BadInput:
            varying = [d for d in (decisions if chain is None else chain.decisions) if not d.constant]
            varying = [d for d in varying if (d.file, d.line) not in idle]
            if not varying:
                raise refused from None
        else:
            for note in notes:
                log.warning(note)
            return program, notes
        raise BadInput(
            f"The model cannot be captured: {control_flow.explain(varying)}.",
            hint="Write that part with torch.where or torch.cond. (Decisions between the layers of a ModuleList, each of which is applied once, "
            "are passed over; "
            + (
                "this model has no such list.)"
                if chain is None
                else f"{chain.name} is one, but these lie elsewhere too.)"
            ),
        ) from refused


def _export(model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> ExportedProgram:
    causes: list[str] = []
    without = 0
    for spec in (Dim("batch", min=1, max=2**16), Dim.AUTO):
        shapes: Any = {k: {0: spec} for k in kwargs} if kwargs else tuple({0: spec} for _ in args)
        try:
            with _quiet(), tracing.settled(model, without):
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            causes.append(_one_line(error))
            without = int(isinstance(error, LookupError))
            log.debug("export with %s failed: %s", spec, error)
            continue
        if program.range_constraints:
            return program
        causes.append(f"the batch dimension of {', '.join(kwargs) or 'its input'} became a constant")
    if any("constant" in cause or "specialized" in cause for cause in causes):
        with _quiet():
            rewritten = rebatched(model, args, kwargs, _flat)
        if rewritten is not None:
            return rewritten
    raise BadInput(
        f"The model cannot be captured by torch.export: {causes[-1]}",
        hint="Usual causes: control flow that depends on the data (`if x.sum() > 0`), numpy or .item() in forward, or a "
        "hard-coded batch. Rewrite that part with tensor operations, or export the model yourself with "
        "torch.export.export and give the saved program.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """torch prints the graph it had so far to stderr where an export fails, and logs what it does about it."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _from_program(program: ExportedProgram) -> Captured:
    program, graph = _functional(program)
    names: list[str] = []
    example: list[torch.Tensor] = []
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise BadInput(
                f"The model's input {node.target!r} is a {type(value).__name__}, not a tensor.",
                hint="Export the model with that argument fixed (functools.partial or a small wrapper module).",
            )
        if value.dim() == 0 or isinstance(value.shape[0], int):
            raise BadInput(
                f"The program's input {node.target!r} has a fixed batch of shape {tuple(value.shape)}.",
                hint="Export it with a dynamic first dimension: torch.export.export(model, (x,), dynamic_shapes="
                '({0: torch.export.Dim("batch")},)), and an example batch larger than 1.',
            )
        names.append(str(node.target))
        example.append(_example_of(value))
    return Captured(graph, program, tuple(names), tuple(example))


def _functional(program: ExportedProgram) -> tuple[ExportedProgram, fx.GraphModule]:
    """The flat graph without in-place operators, and the program it is of."""
    try:
        return program, flatten(_module_of(program))
    except NotLocal as error:
        log.debug("torch makes the program functional: %s", error)
    program = program.run_decompositions({})
    try:
        return program, flatten(_module_of(program))
    except NotLocal as error:
        raise BadInput(
            f"The model overwrites a tensor that outlives the call: {error}.",
            hint="Remove what forward stores in the model (counters, caches), or export it with torch.export yourself.",
        ) from error


def _module_of(program: ExportedProgram) -> fx.GraphModule:
    try:
        return program.module(check_guards=False)  # type: ignore[return-value]
    except TypeError:
        return program.module()  # type: ignore[return-value]


def _example_of(value: torch.Tensor) -> torch.Tensor:
    sizes = [EXAMPLE_BATCH if i == 0 else int(s) for i, s in enumerate(value.shape)]
    if value.dtype.is_floating_point:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(value.dtype)
    if value.dtype == torch.bool:
        return torch.ones(sizes, dtype=torch.bool)
    return torch.ones(sizes, dtype=value.dtype)


def flatten(module: fx.GraphModule) -> fx.GraphModule:
    """A fresh GraphModule with flat tensor inputs and outputs, sharing ``module``'s parameters and buffers.

    Raises:
        NotLocal: an in-place operator that cannot be replaced by its functional twin.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(str(node.target))
            env[node].meta = dict(node.meta)
        elif node.op == "output":
            leaves = [x for x in pytree.tree_leaves(node.args[0]) if isinstance(x, fx.Node)]
            graph.output(tuple(env[x] for x in leaves))
        elif node.op == "call_module" or (node.op == "call_function" and _is_check(node.target)):
            if node.op == "call_module" and str(node.target) != "_guards_fn":
                raise BadInput(f"The captured graph calls the module {node.target!r}, which cannot be read.")
        elif _squeezes_nothing(node):
            env[node] = env[node.all_input_nodes[0]]
        elif _is_only_piece(node):
            env[node] = env[node.all_input_nodes[0].all_input_nodes[0]]
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.target is torch.ops.aten.view.default:
                env[node].target = torch.ops.aten.reshape.default
            elif node.target is torch.ops.aten.type_as.default:
                env[node].target = torch.ops.aten.to.dtype
                env[node].args = (env[node].args[0], node.args[1].meta["val"].dtype)  # type: ignore[union-attr]
    replace_in_place(graph)
    replace_copies(graph)
    flat = fx.GraphModule(module, graph)
    constants.fold(flat)
    flat.graph.eliminate_dead_code(_acts)
    flat.recompile()
    return flat


def _acts(node: fx.Node) -> bool:
    """Whether a node does something beside its result; drawing random numbers for a dropout is nothing."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.is_impure() and not seeded


def _is_only_piece(node: fx.Node) -> bool:
    """The one piece of a tensor that is divided into pieces of at most so many rows: all of it, in every batch where the pieces are computed alike."""
    taken = node.all_input_nodes[0] if node.target is operator.getitem else None
    return taken is not None and taken.target is torch.ops.aten.split.Tensor and len(taken.meta.get("val", ())) == 1


def _squeezes_nothing(node: fx.Node) -> bool:
    """A squeeze of dimensions that are not 1, which does nothing in torch and is an error in ONNX."""
    if node.target not in (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims):
        return False
    shape = node.all_input_nodes[0].meta["val"].shape
    dims = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])  # type: ignore[arg-type]
    return all(isinstance(shape[d], int) and shape[d] != 1 for d in dims) if len(shape) else False  # type: ignore[index]


def _is_check(target: Any) -> bool:
    name = getattr(target, "__name__", str(target))
    return "_assert" in name or "sym_constrain" in name or (isinstance(target, Callable) and "guard" in name)  # type: ignore[arg-type]
