"""One piece of a network as one ONNX graph: names, dynamic batch, and the same bytes every time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import torch
from diffusionblocks.runtime.errors import BadInput
from torch import nn
from torch.export import Dim

OPSET = 20


@dataclass(frozen=True)
class Piece:
    """A module to export: ``module(*example)`` returns a tuple named ``outputs``; dim 0 of every tensor is the batch."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[torch.Tensor, ...]


def to_onnx(piece: Piece) -> onnx.ModelProto:
    """Export with torch.onnx (dynamo), weights inside the returned model.

    Metadata with stack traces is stripped, so that equal pieces give equal bytes.

    Raises:
        BadInput: an operator has no ONNX form, or the batch dimension became static.
    """
    batch = Dim("batch", min=1, max=2**16)
    try:
        with _quiet():
            program = torch.onnx.export(
                piece.module.eval(),
                piece.example,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(piece.inputs),
                output_names=list(piece.outputs),
                dynamic_shapes=tuple({0: batch} for _ in piece.example),
                external_data=False,
            )
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())[:400]
        raise BadInput(
            f"The piece with the inputs {', '.join(piece.inputs)} cannot be exported to ONNX: {cause}",
            hint="Usual causes: an operator without an ONNX form, or a reshape with a hard-coded batch. Rewrite it in the model.",
        ) from error
    if program is None:
        raise BadInput("torch.onnx.export returned nothing.", hint="Check the versions of torch and onnxscript.")
    model = program.model_proto
    _strip(model)
    _name_outputs(model, piece.outputs)
    _check_dynamic(model, piece)
    return model


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


def _name_outputs(model: onnx.ModelProto, names: tuple[str, ...]) -> None:
    """Outputs that are an input, or one tensor twice, get a name of their own by an Identity node."""
    graph = model.graph
    for i, name in enumerate(names):
        if graph.output[i].name != name:
            graph.node.append(onnx.helper.make_node("Identity", [graph.output[i].name], [name]))
            graph.output[i].name = name


def _check_dynamic(model: onnx.ModelProto, piece: Piece) -> None:
    graph = model.graph
    inputs = [i.name for i in graph.input]
    if sorted(inputs) != sorted(piece.inputs) or [o.name for o in graph.output] != list(piece.outputs):
        raise BadInput(
            f"The exported graph has the inputs {inputs} and outputs {[o.name for o in graph.output]}; "
            f"expected {list(piece.inputs)} and {list(piece.outputs)}.",
            hint="Check the versions of torch and onnxscript.",
        )
    static = [
        v.name
        for v in (*graph.input, *graph.output)
        if not v.type.tensor_type.shape.dim or not v.type.tensor_type.shape.dim[0].dim_param
    ]
    if static:
        raise BadInput(
            f"The batch dimension of {', '.join(static)} became a constant in the exported graph.",
            hint="The model reshapes with a hard-coded batch (x.view(3, ...)): use x.shape[0] or -1 there.",
        )
