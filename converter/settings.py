"""What determines a conversion, given the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffusionblocks.converter import blocks
from diffusionblocks.runtime.errors import BadInput

CONTEXTS = ("stem", "frozen", "carry")
PARTITIONS = ("equal-probability", "equal-information")
EVIDENCE = ("auto", "analytic", "learned")


@dataclass(frozen=True)
class Settings:
    """What determines a conversion, given the model: stored in the bundle, enough to rebuild it.

    ``evidence`` is never ``auto`` once set: it is ``learned`` with the context ``stem`` and ``analytic`` otherwise (docs/benchmarks.md).
    """

    num_blocks: int = 3
    context: str = "frozen"
    partition: str = "equal-information"
    evidence: str = "auto"
    tune: str = "block"
    overlap: float = 0.05
    split: str | tuple[int, ...] = "units"
    scratch: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("context", CONTEXTS),
            ("partition", PARTITIONS),
            ("evidence", EVIDENCE),
            ("tune", blocks.TUNES),
        ):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} is {getattr(self, name)!r}.", hint=f"Use one of: {', '.join(allowed)}.")
        if self.evidence == "auto":
            object.__setattr__(self, "evidence", "learned" if self.context == "stem" else "analytic")
        if not 0.0 <= self.overlap <= 1.0:
            raise BadInput(f"overlap is {self.overlap}.", hint="Use a share between 0 and 1, such as 0.05.")
        if self.scratch and (self.context != "stem" or self.tune != "block"):
            raise BadInput(
                f"Training from scratch with context {self.context!r} and tune {self.tune!r}.",
                hint="From scratch there is no trained network to lean on: use --context stem --tune block.",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        values = dict(data)
        if not isinstance(values.get("split", "units"), str):
            values["split"] = tuple(values["split"])
        return cls(**values)
