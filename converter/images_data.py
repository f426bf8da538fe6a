"""Images as what a diffusion model's input is made of: the dataset gives them as that input, and zeros as its time; training adds the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusionblocks.converter.dataset import Batch, Dataset, Wrapped
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from diffusionblocks.converter.network import ConvertedNetwork


def wanted_inputs(network: ConvertedNetwork, specs: Sequence[TensorSpec]) -> tuple[tuple[TensorSpec, ...], str | None]:
    """What data for a diffusion model must give beside labels: its image first, then conditions; and the input that is the image's class, if there is one."""
    own = network.require_target().denoiser
    image = next(s for s in specs if s.name == own.input)
    others = [s for s in specs if s.name not in (own.input, own.time)]
    classes = [s for s in others if len(s.shape) == 1 and s.dtype.startswith("int")]
    label = classes[0].name if len(classes) == 1 else None
    return (image, *(s for s in others if s.name != label)), label


class NoisyImages(Wrapped):
    """A dataset with all of a diffusion model's inputs."""

    def __init__(self, data: Dataset, network: ConvertedNetwork, label: str | None) -> None:
        """
        Args:
            data: has the image and the conditions, and where ``label`` names an input classes as targets.

        Raises:
            BadInput: an input that neither gives.
        """
        super().__init__(data, "images")
        own = network.require_target().denoiser
        self.time, self.label, self.names = own.time, label, network.input_names
        example = dict(zip(network.input_names, network.analysis.captured.example, strict=True))
        self.time_dtype = example[own.time].dtype
        self.label_dtype = None if label is None else example[label].dtype
        missing = sorted(set(self.names) - set(data.names) - {own.time, label})
        if missing:
            raise BadInput(
                f"The data has the inputs {', '.join(data.names)}; the model also takes {', '.join(missing)}.",
                hint="Give a .npz or a table with those, and the class of an image as y.",
            )

    def batch(self, rows: Sequence[int]) -> Batch:
        """All of the model's inputs; no targets, for they are the images themselves."""
        found = self.data.batch(rows)
        inputs = {n: found.inputs[n] for n in self.names if n in found.inputs}
        inputs[self.time] = torch.zeros(len(rows), dtype=self.time_dtype)
        if self.label is not None and self.label not in inputs:
            if found.targets is None:
                raise BadInput(f"The data has no classes for {self.label}.", hint="Give them as y.")
            inputs[self.label] = found.targets.to(self.label_dtype)
        return Batch(inputs, None)
