"""Whether ONNX Runtime has a kernel for everything in a graph: asked while the model is at hand, and not when the bundle is run elsewhere."""

from __future__ import annotations

import onnx
import onnxruntime as ort
from diffusionblocks.runtime.errors import BadInput


def check_openable(model: onnx.ModelProto, inputs: tuple[str, ...]) -> None:
    """Open a graph (its weights may be inputs) without optimizing it.

    Raises:
        BadInput: ONNX Runtime does not open it on a CPU, for the operator and type that its message names.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BadInput(
            f"The piece with the inputs {', '.join(inputs)} was exported, but onnxruntime {ort.__version__} does not open it: "
            f"{' '.join(str(error).split())[:300]}",
            hint="It has no kernel for this operator and type on a CPU. Convert the model to float32 (model.float()), write that operator otherwise, or "
            "upgrade onnxruntime.",
        ) from error
