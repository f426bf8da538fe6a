"""The original network of a bundle as one graph: stem, contexts and head joined, the weights left in the bundle's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from diffusionblocks.runtime.errors import BadInput, BundleError
from diffusionblocks.runtime.files import checked_path
from diffusionblocks.runtime.manifest import GraphRecord, Manifest


def whole_graph(folder: Path, manifest: Manifest) -> onnx.ModelProto:
    """One graph from the model's inputs to the head's outputs.

    Values inside of the k-th graph are named ``partK/...``; a weight that several graphs read is one initializer. The weights are external data in the
    bundle's files: to open it, serialize it and give onnxruntime ``session.model_external_initializers_file_folder_path``, the bundle's folder.

    Args:
        folder: the bundle.
        manifest: its manifest.

    Raises:
        BadInput: the bundle does not hold the original network.
        BundleError: a graph is missing or altered, or graphs do not fit together.
    """
    contexts = [block.context for block in manifest.blocks if block.context is not None]
    if not manifest.exact or len(contexts) != len(manifest.blocks):
        raise BadInput(
            "This bundle does not hold the original network.", hint="It was trained from scratch: use denoise."
        )
    chain = [manifest.stem, *contexts, manifest.head]
    joined = onnx.ModelProto()
    joined.graph.name = "whole"
    values: dict[str, str] = {spec.name: spec.name for spec in manifest.inputs}
    weights: dict[tuple[object, ...], str] = {}
    for k, record in enumerate(chain):
        path = checked_path(folder, record.file, manifest.files)
        part = onnx.load(str(path), load_external_data=False)
        _merge_model(joined, part, record)
        if k == 0:
            joined.graph.input.extend(part.graph.input)
        absent = [v.name for v in part.graph.input if v.name not in values]
        if absent:
            raise BundleError(
                f"{record.file} takes {', '.join(absent)}, which no earlier graph makes.", hint="Export it again."
            )
        names = {v.name: values[v.name] for v in part.graph.input}
        made = {name for node in _nodes(part.graph) for name in node.output if name}
        names |= {name: f"part{k}/{name}" for name in made}
        last = k == len(chain) - 1
        if last:
            names |= {name: name for name in made & set(record.outputs)}
        for tensor in part.graph.initializer:
            key = _place(tensor)
            known = weights.get(key) if key else None
            names[tensor.name] = known or f"part{k}/{tensor.name}"
            if known is None:
                kept = joined.graph.initializer.add()
                kept.CopyFrom(tensor)
                kept.name = names[tensor.name]
                if key:
                    weights[key] = kept.name
        _rename(part.graph, names, f"part{k}/")
        joined.graph.node.extend(part.graph.node)
        if last:
            joined.graph.output.extend(part.graph.output)
            for name in set(record.outputs) - made:  # an input or a weight that is passed on
                joined.graph.node.append(onnx.helper.make_node("Identity", [names[name]], [name]))
        else:
            given = {name: names[name] for name in record.outputs}
            values["stream"] = given.pop("stream_out")
            values |= given
    return joined


def _merge_model(joined: onnx.ModelProto, part: onnx.ModelProto, record: GraphRecord) -> None:
    """Versions of operators, and functions, of a further graph.

    Raises:
        BundleError: they contradict those of an earlier graph.
    """
    joined.ir_version = max(joined.ir_version, part.ir_version)
    versions = {o.domain: o.version for o in joined.opset_import}
    functions = {(f.domain, f.name, f.overload): f.SerializeToString(deterministic=True) for f in joined.functions}
    for opset in part.opset_import:
        if versions.setdefault(opset.domain, opset.version) != opset.version:
            raise BundleError(
                f"{record.file} uses version {opset.version} of the operators {opset.domain or 'of ONNX'}, an earlier graph {versions[opset.domain]}.",
                hint="Export the bundle again.",
            )
    for function in part.functions:
        text = function.SerializeToString(deterministic=True)
        if functions.setdefault((function.domain, function.name, function.overload), text) != text:
            raise BundleError(
                f"{record.file} has another function {function.name} than an earlier graph.",
                hint="Export the bundle again.",
            )
    del joined.opset_import[:]
    joined.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    del joined.functions[:]
    joined.functions.extend(onnx.FunctionProto.FromString(text) for text in functions.values())


def _place(tensor: onnx.TensorProto) -> tuple[object, ...] | None:
    """Where a weight lies in the bundle's files; None where it lies in the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return (tensor.data_type, *tensor.dims, *sorted((e.key, e.value) for e in tensor.external_data))


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of what is nested in it (the branches of an If)."""
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _nodes(inner)


def _rename(graph: onnx.GraphProto, names: dict[str, str], prefix: str) -> None:
    """Give values and nodes their names in the whole graph, in place; names that a nested graph declares itself get the prefix."""
    for node in graph.node:
        node.name = node.name and prefix + node.name
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
        for i, name in enumerate(node.output):
            node.output[i] = names.get(name, name)
        for inner in _subgraphs(node):
            own = [*inner.input, *inner.initializer]
            visible = names | {v.name: prefix + v.name for v in own}
            for value in (*own, *inner.output, *inner.value_info):
                value.name = visible.get(value.name, value.name)
            _rename(inner, visible, prefix)
