"""What the Fashion-MNIST benchmark compares: ways to convert and train, and how long."""

from __future__ import annotations

from dataclasses import dataclass

BLOCKS, SEEDS = 3, (0, 1, 2)
END_TO_END, FINETUNE, FINETUNE_STEM = 4000, 600, 2000


@dataclass(frozen=True)
class Variant:
    """One way to convert and train; the defaults are the command's own."""

    context: str = "frozen"
    partition: str = "equal-information"
    evidence: str = "analytic"
    tune: str = "block"
    anchor: float = 3.0
    scratch: bool = False
    lr: float = 3e-4
    steps: int = FINETUNE

    @property
    def name(self) -> str:
        tag = "scratch" if self.scratch else f"pretrained-{self.tune}"
        context = f"carry-anchor-{self.anchor:g}" if self.context == "carry" else self.context
        rate = f"-lr-{self.lr:g}" if self.context == "stem" else ""
        return f"{tag}-{context}-{self.partition}-{self.evidence}{rate}-updates-{self.steps}"

    @property
    def title(self) -> str:
        """The same for a table's reader."""
        start = "from scratch" if self.scratch else f"tune {self.tune}"
        parts = [self.context, self.partition.replace("-", " "), self.evidence, start]
        parts += [f"anchor {self.anchor:g}"] * (self.context == "carry") + [f"rate {self.lr:g}"]
        return ", ".join([*parts, f"{self.steps} updates"])


def scratch(partition: str, evidence: str) -> Variant:
    return Variant("stem", partition, evidence, scratch=True, lr=1e-3, steps=END_TO_END)


def selection_variants(kind: str) -> list[Variant]:
    """What the held-out images decide: context, partition, evidence, what is trained, the anchor, the rate of ``stem``; for the ResNet a part of it."""
    low = {"lr": 3e-4, "anchor": 0.0}
    pairs = [(p, e) for p in ("equal-information", "equal-probability") for e in ("analytic", "learned")]
    usual = [pair for pair in pairs if pair != ("equal-probability", "analytic")]
    found = [Variant("frozen", p, e) for p, e in pairs]
    found += [
        Variant(c, tune=t) for c in ("frozen", "stem") for t in ("adaln", "lora") if (c, kind) != ("stem", "resnet")
    ]
    found += [Variant("carry"), *(Variant("stem", p, e, lr=1e-3) for p, e in usual)]
    if kind == "resnet":
        return found
    found += [Variant(c, p, e, **low) for c in ("carry", "stem") for p, e in pairs]  # type: ignore[arg-type]
    found += [Variant("carry", anchor=a) for a in (1.0, 10.0)] + [Variant("carry", evidence="learned")]
    return found + [scratch(p, e) for p, e in usual]


def test_variants() -> list[Variant]:
    """The default of each context, the runner-up, and the paper's own setting, from a trained network and from scratch."""
    chosen = Variant("stem", evidence="learned", lr=1e-3, steps=FINETUNE_STEM)
    paper = Variant("stem", "equal-probability", "learned", lr=1e-3, steps=FINETUNE_STEM)
    pretrained = [Variant("frozen"), Variant("frozen", tune="adaln"), Variant("carry"), chosen, paper]
    return pretrained + [scratch("equal-information", "learned"), scratch("equal-probability", "learned")]
