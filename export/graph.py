"""One piece of a network as one ONNX graph: names, dynamic batch, and the same bytes every time.

A piece is exported with its weights as inputs of the graph, which become initializers afterwards. So the exporter merges and folds
no weights, and pieces of one structure (the equal blocks of a transformer) are exported once. The transpose that a linear layer leaves of its weight stays
in the graph where ONNX Runtime makes it part of the product; others are carried out when the weight is stored.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from diffusionblocks.export.cached import cached
from diffusionblocks.export.half import as_half, halved
from diffusionblocks.export.intermediate import bytes_of_values, row_bytes
from diffusionblocks.export.lowering import lowered
from diffusionblocks.export.openable import check_openable
from diffusionblocks.export.operators import translations
from diffusionblocks.export.pairs import as_pair
from diffusionblocks.export.positions import Axes, Shape, shapes_of_values
from diffusionblocks.export.structure import WeightsAsInputs, structure_of, weights_of
from diffusionblocks.export.weights import add_initializer
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import PAST, POSITION, PRESENT, TensorSpec
from torch import nn
from torch.export import Dim

OPSET = 20
BATCH = "batch"


@dataclass(frozen=True)
class Piece:
    """A module to export: ``module(*example)`` returns a tuple named ``outputs``.

    ``axes[i]`` says which dimensions of the i-th input are the batch, or a multiple of it ({0: 1} is the batch first, {0: 12} twelve rows a
    sample, {} no batch at all); without ``axes`` the batch is dimension 0 of every input. ``fixed`` are outputs without a batch.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[torch.Tensor, ...]
    axes: tuple[dict[int, int], ...] | None = None
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """What a template was made of: the graph in float32 with its weights as inputs (as they are stored), the shapes of its values, its names."""

    model: onnx.ModelProto
    shapes: Mapping[str, Shape]
    names: _Names


@dataclass(frozen=True, eq=False)
class Template:
    """An exported structure, its values named ``in.i``, ``weight.i`` and ``out.i``: ``weights[i]`` is the i-th weight's name (None where it is not read), ``orders[i]`` how it is permuted."""

    model: onnx.ModelProto
    weights: tuple[str | None, ...]
    orders: tuple[tuple[int, ...] | None, ...]
    row_bytes: int
    half: bool = False
    source: Source | None = None


@dataclass(frozen=True)
class Apart:
    """A piece as a graph without its weights, the weights by the names of the initializers they are to be (views of the module's own tensors), and the
    structure it is made from; ``names`` maps the structure's names of weights to those."""

    model: onnx.ModelProto
    weights: dict[str, torch.Tensor]
    template: Template
    names: dict[str, str]

    def halves(self, weight: torch.Tensor) -> bool:
        """Whether a weight is stored as float16."""
        return self.template.half and weight.dtype == torch.float32


@dataclass(frozen=True)
class CachedPiece:
    """A piece for new positions: its names, the structure it is made from, what it keeps, and what the axes of the whole piece's outputs hold."""

    piece: Piece
    template: Template
    caches: tuple[TensorSpec, ...]
    outputs: dict[str, Axes]

    def apart(self) -> Apart:
        """The piece as a graph, and its weights apart, which are the whole piece's."""
        return _named(self.template, self.piece)


class Exporter:
    """Exports pieces with torch.onnx (dynamo), each distinct structure once; ``half``: computed in float16."""

    def __init__(self, *, half: bool = False) -> None:
        self._templates: dict[str, Template] = {}
        self._cached: dict[Hashable, tuple[Template, tuple[TensorSpec, ...], tuple[Axes, ...]]] = {}
        self._half = half

    def prepare(self, pieces: Sequence[Piece]) -> int:
        """Export the structures of ``pieces`` that are new in one call, which costs less than a call each; returns how many there were."""
        new = {key: piece for piece in pieces if (key := _key(piece)) is not None and key not in self._templates}
        try:
            self._templates |= dict(zip(new, _export(list(new.values()), self._half), strict=True)) if new else {}
        except BadInput:
            if len(new) > 1:
                return 0  # each alone, so that the error names the piece
            raise
        return len(new)

    def __call__(self, piece: Piece) -> onnx.ModelProto:
        """The piece as a graph with its weights inside; see :meth:`apart`."""
        apart = self.apart(piece)
        for name, weight in apart.weights.items():
            add_initializer(apart.model, name, halved(weight) if apart.halves(weight) else weight)
        return apart.model

    def apart(self, piece: Piece) -> Apart:
        """The piece as a graph, and its weights apart.

        Metadata with stack traces is stripped, so that equal pieces give equal bytes.

        Raises:
            BadInput: an operator has no ONNX form, or the batch dimension became static.
        """
        key = _key(piece)
        template = self._templates.get(key) if key is not None else None
        if template is None:
            template = _export([piece], self._half)[0]
            if key is not None:
                self._templates[key] = template
        return _named(template, piece)

    def cached(self, piece: Piece, axes: Mapping[str, Axes], length: int) -> CachedPiece:
        """The piece for new positions only.

        Args:
            piece: exported before, or now.
            axes: what the axes of its inputs hold.
            length: how many positions the piece computes.

        Raises:
            NoForm: it has no such form.
        """
        whole = self.apart(piece).template
        held = tuple(axes[name] for name in piece.inputs)
        if (whole, held, length) not in self._cached:
            self._cached[whole, held, length] = _cached(whole, held, length)
        template, caches, outputs = self._cached[whole, held, length]
        names = [spec.name for spec in caches]
        made = replace(
            piece,
            inputs=(*piece.inputs, *names, POSITION),
            outputs=(*piece.outputs, *(f"{PRESENT}{name.removeprefix(PAST)}" for name in names)),
        )
        return CachedPiece(made, template, caches, dict(zip(piece.outputs, outputs, strict=True)))


def to_onnx(piece: Piece) -> onnx.ModelProto:
    """Export one piece; see :class:`Exporter`."""
    return Exporter()(piece)


def _key(piece: Piece) -> str | None:
    structure = structure_of(piece.module)
    if structure is None:
        return None
    shapes = [f"{t.dtype} {tuple(t.shape)}" for t in piece.example]
    return "\n".join([structure, *shapes, str(piece.axes), str(len(piece.outputs))])


class _Together(nn.Module):
    """Several modules with their weights as inputs, side by side: ``forward(*inputs and weights of the first, of the second, ...)``."""

    def __init__(self, modules: Sequence[nn.Module], counts: Sequence[int]) -> None:
        super().__init__()
        self._modules_and_counts = [(WeightsAsInputs(m), n) for m, n in zip(modules, counts, strict=True)]

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results: list[torch.Tensor] = []
        for module, count in self._modules_and_counts:
            results += module(*values[:count])
            values = values[count:]
        return tuple(results)


@dataclass(frozen=True)
class _Names:
    """Names of one piece's values in a graph that may hold several; ``levels``: of the inputs that are noisy targets and noise levels."""

    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    levels: tuple[str, ...] = ()


def _export(pieces: Sequence[Piece], half: bool) -> list[Template]:
    arguments: list[torch.Tensor] = []
    shapes: list[Any] = []
    names: list[_Names] = []
    counts: list[int] = []
    for k, piece in enumerate(pieces):
        weights = [as_pair(w.detach()) for w in weights_of(piece.module.eval()).values()]
        # new objects: torch takes one that two pieces share for one input
        example = [as_pair(e.detach()) for e in piece.example]
        arguments += [*example, *weights]
        batch = Dim(f"{BATCH}_{k}", min=1, max=2**16)  # its own, or one piece would read another's inputs for its size
        axes = piece.axes or tuple({0: 1} for _ in piece.example)
        shapes += [{d: batch if times == 1 else times * batch for d, times in of.items()} for of in axes]
        shapes += [None for _ in weights]
        counts.append(len(piece.example) + len(weights))
        lists = (("in", piece.inputs), ("weight", weights), ("out", piece.outputs))
        names.append(_Names(*(tuple(f"{what}.{k}.{i}" for i in range(len(of))) for what, of in lists)))  # type: ignore[arg-type]
    outputs = [name for n in names for name in n.outputs]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Together([lowered(piece.module, piece.example) for piece in pieces], counts),
                tuple(arguments),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[name for n in names for name in (*n.inputs, *n.weights)],
                output_names=outputs,
                dynamic_shapes=(tuple(shapes),),
                external_data=False,
                custom_translation_table=translations(),
            )
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())[:400]
        raise BadInput(
            f"The piece with the inputs {', '.join(pieces[0].inputs)} cannot be exported to ONNX: {cause}",
            hint="Usual causes: an operator without an ONNX form, or a reshape with a hard-coded batch. Rewrite it in the model.",
        ) from error
    if program is None:
        raise BadInput("torch.onnx.export returned nothing.", hint="Check the versions of torch and onnxscript.")
    model = program.model_proto
    sizes, known = bytes_of_values(model), shapes_of_values(model)
    _strip(model)
    _name_outputs(model, outputs)
    parts = (_part(model, k, n) for k, n in enumerate(names))
    return [_template(part, n, piece, sizes, known, half) for part, n, piece in zip(parts, names, pieces, strict=True)]


def _part(model: onnx.ModelProto, k: int, names: _Names) -> onnx.ModelProto:
    """The part of a graph that makes the outputs of its k-th piece."""
    nodes = list(model.graph.node)
    makers = {name: i for i, node in enumerate(nodes) for name in node.output}
    wanted: set[int] = set()
    read: set[str] = set()
    stack = list(names.outputs)
    while stack:
        name = stack.pop()
        if name in read:
            continue
        read.add(name)
        maker = makers.get(name)
        if maker is not None and maker not in wanted:
            wanted.add(maker)
            stack += [n for inner in _nodes([nodes[maker]]) for n in inner.input]
    part = onnx.ModelProto()
    part.CopyFrom(model)
    own = {*names.inputs, *names.weights}
    foreign = sorted(name for name in read & {i.name for i in model.graph.input} if name not in own)
    if foreign:
        raise BadInput(f"The exported graph reads {foreign[0]} of another piece.", hint="Check the version of torch.")
    for kept, every in (
        ([nodes[i] for i in sorted(wanted)], part.graph.node),
        ([t for t in model.graph.initializer if t.name in read], part.graph.initializer),
        ([i for i in model.graph.input if i.name in own], part.graph.input),
        ([o for o in model.graph.output if o.name in names.outputs], part.graph.output),
    ):
        del every[:]  # type: ignore[attr-defined]
        every.extend(kept)  # type: ignore[attr-defined]
    for value in (*part.graph.input, *part.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = dim.dim_param.replace(f"{BATCH}_{k}", BATCH)
    return part


def _template(
    model: onnx.ModelProto,
    names: _Names,
    piece: Piece,
    sizes: Mapping[str, int],
    shapes: Mapping[str, Shape],
    half: bool,
) -> Template:
    check_openable(model, piece.inputs)
    orders = _fold_transposes(model, names.weights)
    _check(model, names, piece)
    _as_stored(model, orders)
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    levels = [own for own, name in zip(names.inputs, piece.inputs, strict=True) if name in ("z", "sigma")]
    source = Source(plain, shapes, replace(names, levels=tuple(levels)))
    in_order = tuple(orders.get(name) for name in names.weights)
    return _finished(model, source.names, in_order, sizes, half, source)


def _finished(
    model: onnx.ModelProto,
    names: _Names,
    orders: tuple[tuple[int, ...] | None, ...],
    sizes: Mapping[str, int],
    half: bool,
    source: Source | None,
) -> Template:
    """The template of a graph with its weights as inputs."""
    read = {name for node in _nodes(model.graph.node) for name in node.input} | {o.name for o in model.graph.output}
    if half:
        model = as_half(model, (*names.inputs, *names.outputs), names.levels)
        check_openable(model, names.inputs)
    for value in [i for i in model.graph.input if i.name in names.weights]:
        model.graph.input.remove(value)
    taken = row_bytes(model, sizes, set(names.weights))
    own = {name: f"weight.{i}" for i, name in enumerate(names.weights)}
    own |= {name: f"in.{i}" for i, name in enumerate(names.inputs)}
    own |= {name: f"out.{i}" for i, name in enumerate(names.outputs)}
    _rename(model.graph, own)
    kept = tuple(own[name] if name in read else None for name in names.weights)
    return Template(model, kept, orders, taken, half, source)


def _cached(
    whole: Template, axes: tuple[Axes, ...], length: int
) -> tuple[Template, tuple[TensorSpec, ...], tuple[Axes, ...]]:
    """The structure for new positions, what it keeps, and what the axes of its outputs hold."""
    source = whole.source
    assert source is not None
    names = source.names
    made = cached(source.model, source.shapes, dict(zip(names.inputs, axes, strict=True)), length)
    kept = [spec.name for spec in made.caches]
    inputs = (*names.inputs, *kept, POSITION)
    outputs = (*names.outputs, *(f"{PRESENT}{name.removeprefix(PAST)}" for name in kept))
    check_openable(made.model, inputs)
    template = _finished(made.model, replace(names, inputs=inputs, outputs=outputs), whole.orders, {}, whole.half, None)
    template = replace(template, row_bytes=whole.row_bytes)
    return template, made.caches, tuple(made.outputs[name] for name in names.outputs)


def _as_stored(model: onnx.ModelProto, orders: Mapping[str, tuple[int, ...]]) -> None:
    """Permute the dimensions of weights as their numbers will be."""
    for value in model.graph.input:
        if value.name in orders:
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            for dim, k in zip(value.type.tensor_type.shape.dim, orders[value.name], strict=True):
                dim.dim_value = dims[k]


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs as well."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g.node)


def _fold_transposes(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Remove the transposes of weights that nothing else reads, but for those that a product takes in; returns the permutation each weight is to be stored with."""
    graph = model.graph
    products = _product_operands(graph)
    readers: dict[str, list[onnx.NodeProto]] = {name: [] for name in names}
    inner: set[str] = set()
    for node in graph.node:
        for name in node.input:
            if name in readers:
                readers[name].append(node)
        for attribute in node.attribute:
            inner |= {name for n in _nodes(attribute.g.node) for name in n.input}
    orders: dict[str, tuple[int, ...]] = {}
    renamed: dict[str, str] = {}
    removed: list[onnx.NodeProto] = []
    for name, nodes in readers.items():
        found = {_permutation(node) for node in nodes}
        order = next(iter(found)) if len(found) == 1 else None
        if order is None or name in inner or all(products.get(node.output[0], False) for node in nodes):
            continue
        orders[name] = order
        removed += nodes
        renamed |= {node.output[0]: name for node in nodes}
    for node in removed:
        graph.node.remove(node)
    for node in _nodes(graph.node):
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    for output in graph.output:
        if output.name in renamed:  # a transposed weight is itself an output: keep its name
            graph.node.append(onnx.helper.make_node("Identity", [renamed[output.name]], [output.name]))
    return orders


def _product_operands(graph: onnx.GraphProto) -> dict[str, bool]:
    """Outputs of the graph's transposes of float32 matrices: whether products alone read them, of which ONNX Runtime makes them a part."""
    matrices = {
        value.name
        for value in graph.input
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and len(value.type.tensor_type.shape.dim) == 2
    }
    found = {n.output[0]: True for n in graph.node if n.op_type == "Transpose" and n.input[0] in matrices}
    for node in _nodes(graph.node):
        for name in set(node.input) & set(found):
            found[name] &= node.op_type in ("MatMul", "Gemm")
    for output in graph.output:
        found.pop(output.name, None)
    return found


def _permutation(node: onnx.NodeProto) -> tuple[int, ...] | None:
    if node.op_type != "Transpose" or node.domain:
        return None
    return next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)


def _named(template: Template, piece: Piece) -> Apart:
    """The template with the piece's own names, and the piece's weights in the layout it reads."""
    model = onnx.ModelProto()
    model.CopyFrom(template.model)
    own = {f"in.{i}": name for i, name in enumerate(piece.inputs)}
    own |= {f"out.{i}": name for i, name in enumerate(piece.outputs)}
    taken = {name for node in _nodes(model.graph.node) for name in (*node.input, *node.output)} | set(own.values())
    own |= {f"weight.{i}": name for i, name in enumerate(weights_of(piece.module)) if name not in taken}
    _rename(model.graph, own)
    weights = {}
    names = {name: own.get(name, name) for name in template.weights if name is not None}
    for name, order, tensor in zip(template.weights, template.orders, weights_of(piece.module).values(), strict=True):
        if name is not None:
            weights[names[name]] = as_pair(tensor) if order is None else as_pair(tensor.detach()).permute(order)
    return Apart(model, weights, template, names)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in _nodes(graph.node):
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                if name in names:
                    values[i] = names[name]


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    graph.name = "graph"
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _name_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Outputs that are an input, or one tensor twice, get a name of their own by an Identity node."""
    graph = model.graph
    for i, name in enumerate(names):
        if graph.output[i].name != name:
            graph.node.append(onnx.helper.make_node("Identity", [graph.output[i].name], [name]))
            graph.output[i].name = name


def _check(model: onnx.ModelProto, names: _Names, piece: Piece) -> None:
    graph = model.graph
    found = [i.name for i in graph.input]
    if not set(names.inputs) <= set(found) or [o.name for o in graph.output] != list(names.outputs):
        raise BadInput(
            f"The exported graph has the inputs {found} and outputs {[o.name for o in graph.output]}; "
            f"expected {[*names.inputs, *names.weights]} and {list(names.outputs)}.",
            hint="Check the versions of torch and onnxscript.",
        )
    own = dict(zip((*names.inputs, *names.outputs), (*piece.inputs, *piece.outputs), strict=True))
    fixed = {*piece.fixed, *(n for n, of in zip(piece.inputs, piece.axes or (), strict=False) if not of)}
    static = [
        own[v.name]
        for v in (*graph.input, *graph.output)
        if v.name in own and own[v.name] not in fixed and not any(d.dim_param for d in v.type.tensor_type.shape.dim)
    ]
    if static:
        raise BadInput(
            f"The batch dimension of {', '.join(static)} became a constant in the exported graph.",
            hint="The model reshapes with a hard-coded batch (x.view(3, ...)): use x.shape[0] or -1 there.",
        )
