"""A graph computed in float16: half the bytes of weights, and the fast arithmetic of GPUs. Its inputs and outputs stay float32, so that graphs of both kinds fit together.

The conversion is onnxruntime's own; operators that lose too much by it, or have no kernel, stay in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import onnx
import torch
from diffusionblocks.runtime.errors import BadInput

LARGEST = 65504.0


def as_half(model: onnx.ModelProto, kept: Sequence[str], exact: Collection[str] = ()) -> onnx.ModelProto:
    """A graph in float16.

    Args:
        model: a graph with its weights as inputs.
        kept: the inputs and outputs that stay float32; the others, weights, become float16.
        exact: inputs such as noise levels; what is computed from them (and weights) alone stays float32.

    Raises:
        BadInput: the graph cannot be converted.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    level = logging.getLogger("onnxruntime.transformers.float16").level
    logging.getLogger("onnxruntime.transformers.float16").setLevel(logging.ERROR)
    try:
        made = convert_float_to_float16(model, keep_io_types=list(kept), node_block_list=_only_from(model, kept, exact))
    except Exception as error:
        raise BadInput(
            f"The piece with the inputs {', '.join(kept)} has no float16 form: {' '.join(str(error).split())[:300]}",
            hint="Convert with --dtype float32.",
        ) from error
    finally:
        logging.getLogger("onnxruntime.transformers.float16").setLevel(level)
    del made.graph.value_info[:]
    _without_detours(made.graph, kept)
    OnnxModel.graph_topological_sort(made.graph, is_deterministic=True)
    return made


def _without_detours(graph: onnx.GraphProto, kept: Sequence[str]) -> None:
    """Between nodes that stay float32 the conversion goes through float16 and back: read the float32 value itself."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    to = {name: next(a.i for a in node.attribute if a.name == "to") for name, node in casts.items()}
    direct = {}
    for name, node in casts.items():
        before = casts.get(node.input[0])
        if to[name] != onnx.TensorProto.FLOAT or before is None or to[before.output[0]] != onnx.TensorProto.FLOAT16:
            continue
        if before.input[0] in kept or before.input[0].endswith("_cast_to_fp16"):  # as the conversion names them
            direct[name] = before.input[0]
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = direct.get(name, name)
    for way in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):  # what nobody reads any more, the way back first
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        read |= {name for node in graph.node for a in node.attribute for n in a.g.node for name in n.input}
        for name, node in casts.items():
            if to[name] == way and name not in read:
                graph.node.remove(node)


def _only_from(model: onnx.ModelProto, kept: Sequence[str], exact: Collection[str]) -> list[str]:
    """Names of nodes that depend on ``exact`` inputs and on none of the others that are ``kept``."""
    others, own, names = {name for name in kept if name not in exact}, set(exact), []
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
        read = {*node.input, *(name for a in node.attribute for n in a.g.node for name in n.input)}
        if read & others:
            others.update(node.output)
        elif read & own:
            own.update(node.output)
            names.append(node.name)
    return names


def halved(weight: torch.Tensor) -> torch.Tensor:
    """A float32 weight as float16; what is larger than float16 holds becomes the largest it holds, infinity stays."""
    finite = weight.detach().clamp(-LARGEST, LARGEST)
    return torch.where(weight.isinf(), weight, finite).half()
