"""How blocks are trained, and what training one took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusionblocks.runtime.errors import BadInput

PRECISIONS = ("float32", "bf16", "fp16")
TARGETS = ("labels", "teacher")
WEIGHTINGS = ("auto", "none", "edm", "elbo")


@dataclass(frozen=True)
class TrainOptions:
    """How every block is trained.

    ``steps``: updates of each block; ``batch_size``: samples of an update, over all ranks that share a block and all its ``accumulate`` parts;
    ``weighting``: ``none`` or ``edm`` (per sample), by ``auto`` the latter for numbers; ``lr`` peaks after a short warm-up, then decays to 0: 1e-3 where it is None and the context
    is ``stem``, whose blocks move further from the original, else 3e-4; ``anchor``: in the context ``carry``,
    weight of the passed-on state's squared distance from the original's, relative to the latter's variance; ``targets``: the data's ``labels``, or the
    original network's own predictions (``teacher``), for data without labels; ``clean``: weight of a second loss on f alone, without the evidence of z;
    ``precision``: what the products are computed in (weights, moments and losses stay float32); ``checkpointing``: keep the
    state between units alone and compute the rest again; ``ema``: decay of the averaged weights that are kept in the end, 0 for none;
    ``null``: the class that stands for none, which a tenth of a diffusion model's samples get, -1 for none; ``fused``: torch's fused AdamW; ``cache_features``: compute what feeds a block once for each row and keep it on disk.
    """

    steps: int = 2000
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    weighting: str = "auto"
    anchor: float = 3.0
    seed: int = 0
    targets: str = "labels"
    clean: float = 0.0
    precision: str = "float32"
    accumulate: int = 1
    checkpointing: bool = False
    ema: float = 0.0
    fused: bool = True
    cache_features: bool = False
    null: int = -1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or (self.lr is not None and not self.lr > 0):
            raise BadInput(
                f"steps {self.steps}, batch size {self.batch_size}, learning rate {self.lr}.",
                hint="Each must be positive; to convert without training leave --data out.",
            )
        if not 1 <= self.accumulate <= self.batch_size:
            raise BadInput(
                f"A batch of {self.batch_size} cannot be divided into {self.accumulate} parts.",
                hint="Give --accumulate between 1 and the batch size.",
            )
        if not (self.anchor >= 0 and self.clean >= 0 and 0 <= self.ema < 1):
            raise BadInput(
                f"The anchor is {self.anchor}, the weight of the clean loss {self.clean}, the EMA's decay {self.ema}.",
                hint="The first two are 0 (none) or more, the decay is 0 (none) or more and below 1, such as 0.999.",
            )
        for name, allowed in (("weighting", WEIGHTINGS), ("precision", PRECISIONS), ("targets", TARGETS)):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} is {getattr(self, name)!r}.", hint=f"Use one of: {', '.join(allowed)}.")


@dataclass
class BlockLog:
    """What training one block took and measured: ``loss[i]`` at ``step[i]``, parameters trained, bytes of weights with gradients and Adam's moments.

    ``validation``: what was measured on held-out rows meanwhile, one entry a time; ``seconds`` counts earlier parts of a resumed training too.
    """

    block: int
    options: TrainOptions
    seconds: float = 0.0
    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    trained_parameters: int = 0
    training_bytes: int = 0
    threads: int = 0
    validation: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As the manifest says it."""
        return {
            "block": self.block,
            "seconds": round(self.seconds, 3),
            "loss": self.loss,
            "step": self.step,
            "trained_parameters": self.trained_parameters,
            "training_bytes": self.training_bytes,
            "options": vars(self.options),
            "threads": self.threads,
            "validation": self.validation,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BlockLog:
        return cls(**{**data, "options": TrainOptions(**data["options"])})
