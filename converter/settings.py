"""What determines a conversion, given the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffusionblocks.converter import blocks
from diffusionblocks.converter.denoiser_target import Denoiser
from diffusionblocks.runtime.errors import BadInput

CONTEXTS = ("auto", "stem", "frozen", "carry")
PARTITIONS = ("auto", "equal-probability", "equal-information")
TASKS = ("auto", "classification", "multi-label", "regression", "features", "lm", "mdm", "diffusion")
BLOCKS = 3
"""Number of blocks where it is not given."""
EVIDENCE = ("auto", "analytic", "learned")
ENDS = ("auto", "shared", "own")


@dataclass(frozen=True)
class Settings:
    """What determines a conversion, given the model: stored in the bundle, enough to rebuild it.

    ``recurrent``: units that are applied again with the same weights are one block, trained in one pass (``loop``).
    ``new_labels``: number of classes the original did not learn; each block then has a head of its own for them, which starts afresh.
    ``ends``: whether the blocks share the original's stem and head, which stay as they are, or train copies of their own; ``auto`` is ``own`` from scratch and for diffusion models, else ``shared``.
    ``context`` ``auto`` is ``stem`` for diffusion models, masked language models and new labels, else ``frozen``. ``task``: what the first output is; ``auto`` takes a row of two or more numbers for logits. ``partition`` ``auto`` is ``equal-information`` for classes and
    ``equal-probability`` for numbers. ``evidence`` is never ``auto`` once set: it is ``learned`` with the context ``stem`` and ``analytic`` otherwise (docs/benchmarks.md).
    """

    num_blocks: int = BLOCKS
    context: str = "auto"
    partition: str = "auto"
    evidence: str = "auto"
    tune: str = "block"
    ends: str = "auto"
    overlap: float = 0.05
    split: str | tuple[int, ...] = "units"
    scratch: bool = False
    new_labels: int = 0
    seed: int = 0
    task: str = "auto"
    denoiser: Denoiser | None = None
    mask_token: int = -1
    recurrent: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("context", CONTEXTS),
            ("partition", PARTITIONS),
            ("evidence", EVIDENCE),
            ("tune", blocks.TUNES),
            ("ends", ENDS),
            ("task", TASKS),
        ):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} is {getattr(self, name)!r}.", hint=f"Use one of: {', '.join(allowed)}.")
        if self.recurrent:
            self._check_recurrent()
        if self.context == "auto":
            alone = self.task in ("diffusion", "mdm") or bool(self.new_labels)
            object.__setattr__(self, "context", "stem" if alone else "frozen")
        if self.task in ("diffusion", "mdm"):
            self._check_entering()
        if (self.task == "mdm") != (self.mask_token >= 0):
            raise BadInput(
                f"The task {self.task} with the mask token {self.mask_token}: a token stands for hidden ones in the task mdm, and in no other.",
                hint="Give --mask-token K with --task mdm.",
            )
        if self.evidence == "auto":
            object.__setattr__(self, "evidence", "learned" if self.context == "stem" else "analytic")
        if not 0.0 <= self.overlap <= 1.0:
            raise BadInput(f"overlap is {self.overlap}.", hint="Use a share between 0 and 1, such as 0.05.")
        if self.new_labels and (self.new_labels < 2 or self.scratch):
            raise BadInput(
                f"new_labels is {self.new_labels}{' from scratch' if self.scratch else ''}.",
                hint="Give the number of new classes, 2 or more, for a trained network; from scratch build the model with as many outputs.",
            )
        if self.ends == "auto":
            object.__setattr__(self, "ends", "own" if self.scratch or self.task == "diffusion" else "shared")
        if self.scratch and (self.context, self.tune, self.ends) != ("stem", "block", "own"):
            raise BadInput(
                f"Training from scratch with context {self.context!r}, tune {self.tune!r} and ends {self.ends!r}.",
                hint="From scratch there is no trained network to lean on: use --context stem --tune block --ends own.",
            )
        if self.ends == "own" and self.context != "stem":
            raise BadInput(
                f"Ends of the blocks' own with the context {self.context}: there the original's blocks feed a block, and they read the original's stem.",
                hint="Use --context stem, or --ends shared.",
            )

    def _check_recurrent(self) -> None:
        if (
            self.context not in ("auto", "stem")
            or self.task in ("diffusion", "mdm")
            or self.num_blocks not in (1, BLOCKS)
        ):
            raise BadInput(
                f"Recurrent depth with the context {self.context}, the task {self.task} and {self.num_blocks} blocks: the loop is one block that reads the stem and z.",
                hint="Leave --context and --num-blocks out, and give a task whose target is not the network's own input.",
            )
        object.__setattr__(self, "context", "stem")
        object.__setattr__(self, "num_blocks", 1)

    def _check_entering(self) -> None:
        if self.context != "stem":
            raise BadInput(
                f"The task {self.task} with the context {self.context}: blocks of a model that denoises its own input read that by the stem.",
                hint="Use --context stem.",
            )
        if self.tune == "adaln":
            raise BadInput(
                f"The task {self.task} with --tune adaln: a model that denoises its own input keeps its own conditioning and gets no other.",
                hint="Use --tune block or lora.",
            )
        if self.denoiser is None and self.task == "diffusion":
            object.__setattr__(self, "denoiser", Denoiser("edm"))

    def check_targets(self, targets: str) -> None:
        """Whether there is an original that can teach, where the ``targets`` are its.

        Raises:
            BadInput: there is none.
        """
        if targets == "teacher" and (self.scratch or self.new_labels):
            raise BadInput(
                "A network that is trained from scratch, or for new labels, has no original to learn from.",
                hint="Give labels, or convert a trained network.",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        values = {"ends": "own" if data.get("scratch") else "shared", **data}
        if not isinstance(values.get("split", "units"), str):
            values["split"] = tuple(values["split"])
        if isinstance(values.get("denoiser"), Mapping):
            said = dict(values["denoiser"])
            values["denoiser"] = Denoiser(**{**said, "sigmas": tuple(said.get("sigmas", ()))})
        return cls(**values)
