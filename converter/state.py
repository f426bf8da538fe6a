"""What of a block's training is kept between updates: trained tensors, Adam's moments, averaged weights; written whole, read back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusionblocks.converter.mapped import apart, write_tensors
from diffusionblocks.converter.saved import read_safetensors
from diffusionblocks.runtime.errors import BadInput
from torch import nn

WEIGHT, MOMENT, AVERAGE = "weight.", "moment.", "average."
NAME = "training.safetensors"


class BlockState:
    """The tensors of one block's training by name, live: what :meth:`save` writes and :meth:`load` fills."""

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        average: dict[str, torch.Tensor],
    ) -> None:
        """
        Args:
            weights: everything training may change, batch statistics among it.
            trained: the parameters the optimizer moves.
            optimizer: AdamW.
            average: the averaged weights, or nothing.
        """
        self.weights, self.trained, self.optimizer, self.average = weights, trained, optimizer, average

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write ``training.safetensors`` in ``folder``, with ``about`` (step, log, ...) as JSON in its header."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {WEIGHT + n: t for n, t in self.weights.items()} | {AVERAGE + n: t for n, t in self.average.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{MOMENT}{key}.{name}"] = torch.as_tensor(value)
        write_tensors(apart(tensors), folder / NAME, {"about": json.dumps(about)})

    def load(self, folder: Path) -> dict[str, Any]:
        """Fill everything from :meth:`save`'s file; returns ``about``.

        Raises:
            BadInput: the file is cut off, or of another block or optimizer.
        """
        path = folder / NAME
        way_out = "It belongs to another training or was cut off. --restart begins the block anew."
        try:
            tensors, metadata = read_safetensors(path)
            about = json.loads(metadata["about"])
        except (BadInput, KeyError, ValueError) as error:
            raise BadInput(f"The checkpoint {path} cannot be read.", hint=way_out) from error
        live = {WEIGHT + n: t for n, t in self.weights.items()} | {AVERAGE + n: t for n, t in self.average.items()}
        moments = {n for n in tensors if n.startswith(MOMENT)}
        wrong = sorted(set(live) ^ (set(tensors) - moments)) or [n for n in live if live[n].shape != tensors[n].shape]
        wrong = wrong or self._load_moments({n: tensors[n] for n in moments})
        if wrong:
            raise BadInput(f"The checkpoint {path} does not fit: {', '.join(wrong[:4])}.", hint=way_out)
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(tensors[name])
        return dict(about)

    def _load_moments(self, moments: dict[str, torch.Tensor]) -> list[str]:
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for full, tensor in moments.items():
            key, _, name = full.removeprefix(MOMENT).partition(".")
            by_name.setdefault(name, {})[key] = tensor
        wrong = sorted(set(by_name) ^ set(self.trained))
        wrong += [n for n, of in by_name.items() if n in self.trained and of["exp_avg"].shape != self.trained[n].shape]
        for name, of in by_name.items() if not wrong else ():
            parameter = self.trained[name]
            self.optimizer.state[parameter] = {
                key: value.clone()
                if key == "step" and not _on_device(self.optimizer)
                else value.to(parameter.device, copy=True)
                for key, value in of.items()
            }
        return wrong


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the number of updates is kept on the device, as fused optimizers do."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def exists(folder: Path) -> bool:
    return (folder / NAME).is_file()
