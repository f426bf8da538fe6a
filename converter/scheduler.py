"""The noise levels of a diffusion model's time steps, from a scheduler's configuration as diffusers writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.converter.denoiser_target import Denoiser
from diffusionblocks.converter.saved import import_package, one_line, read_json
from diffusionblocks.runtime.errors import BadInput

NAME = "scheduler_config.json"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def read_scheduler(path: Path, parameterisation: str | None) -> Denoiser:
    """What a scheduler says of its model.

    Args:
        path: ``scheduler_config.json``, the folder it lies in, or a pipeline's folder.
        parameterisation: in place of the scheduler's ``prediction_type``.

    Raises:
        BadInput: no such file, a scheduler that is not variance preserving, or one of another version.
    """
    file = next((f for f in (path, path / NAME, path / "scheduler" / NAME) if f.is_file()), None)
    if file is None:
        raise BadInput(f"{path} holds no {NAME}.", hint="Give the file that diffusers' save_pretrained wrote.")
    config = read_json(file)
    kind = parameterisation or PREDICTIONS.get(str(config.get("prediction_type", "epsilon")))
    name = str(config.get("_class_name", ""))
    if kind is None or "FlowMatch" in name or "EDM" in name:
        raise BadInput(
            f"The scheduler {name or file.name} predicts {config.get('prediction_type', 'a flow')}, which is none of {', '.join(PREDICTIONS)} on time steps.",
            hint="Models of eps, v and x0 convert, and edm by --parameterisation edm without a scheduler.",
        )
    return Denoiser(kind, _sigmas(config, file))


def _sigmas(config: dict[str, Any], file: Path) -> tuple[float, ...]:
    scheduler = import_package("diffusers").DDPMScheduler
    known = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("prediction_type", "variance_type")}
    try:
        alphas = np.asarray(scheduler.from_config(known).alphas_cumprod, np.float64)
    except Exception as error:
        raise BadInput(
            f"{file} is no scheduler that this version of diffusers reads: {one_line(error)}",
            hint="Give a scheduler with beta_schedule, beta_start, beta_end and num_train_timesteps.",
        ) from error
    levels = np.sqrt((1 - alphas) / np.maximum(alphas, 1e-12))
    return tuple(float(s) for s in levels[alphas > 1e-9])
