"""Draws the pictures of docs/method.md, from the project's own mathematics where they show any: ``python docs/pictures.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from diffusionblocks.runtime import schedule

FOLDER = Path(__file__).parent / "pictures"
COLOURS = ("#1f6fb2", "#c2571a", "#2e8540", "#8a4fbf")
GREY, PAPER = "#5d636e", "#ffffff"
WIDTH = 720


def text(x: float, y: float, said: str, *, size: int = 14, anchor: str = "middle", colour: str = "#1d1f23") -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(said)}</text>'
    )


def box(x: float, y: float, w: float, h: float, said: str, colour: str = GREY, below: str = "") -> str:
    found = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{colour}" fill-opacity=".12" stroke="{colour}" stroke-width="2"/>'
    found += text(x + w / 2, y + h / 2 + (0 if below else 5), said)
    return found + (text(x + w / 2, y + h / 2 + 17, below, size=12, colour=GREY) if below else "")


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = GREY, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2" marker-end="url(#tip)"{dash}/>'


def page(height: int, title: str, parts: Sequence[str]) -> str:
    tip = f'<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 10 5 0 10z" fill="{GREY}"/></marker></defs>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" role="img"><title>{escape(title)}</title>'
    return "\n".join(
        [start, tip, f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}" rx="8"/>', *parts, "</svg>\n"]
    )


def chain() -> str:
    """A residual network, and the same as steps of denoising."""
    parts = [text(20, 34, "A residual network: each unit adds to the state", anchor="start", size=15)]
    names = ["stem", "z + f1(z)", "z + f2(z)", "z + f3(z)", "z + f4(z)", "z + f5(z)", "z + f6(z)", "head"]
    for i, name in enumerate(names):
        x = 20 + i * 88
        parts.append(box(x, 50, 74, 40, name, GREY if i in (0, 7) else COLOURS[(i - 1) // 2]))
        if i:
            parts.append(arrow(x - 14, 70, x - 1, 70))
    parts.append(
        text(20, 146, "The same units as blocks: each a denoiser of its own noise levels", anchor="start", size=15)
    )
    edges = schedule.equal_probability_edges(3)
    for b, (high, low) in enumerate(pairwise(edges)):
        x = 20 + b * 232
        parts.append(box(x, 200, 150, 60, f"block {b}", COLOURS[b], f"sigma {high:.3g} to {low:.3g}"))
        parts.append(text(x + 75, 184, "x, z, sigma", size=12, colour=GREY))
        parts.append(arrow(x + 150, 230, x + 231, 230))
        parts.append(text(x + 190, 220, "z'" if b < 2 else "y", size=13))
    parts.append(
        text(
            20,
            292,
            "z starts as noise around the answer y, and each block takes it one step nearer: z' = z + (s' - s)/s (z - D(z))",
            anchor="start",
            size=13,
            colour=GREY,
        )
    )
    return page(310, "A residual chain, and its blocks as denoising steps", parts)


def partition() -> str:
    """Density of log sigma with equal shares, by the paper's density and by information."""
    table = np.eye(10)
    curves = []
    sigmas = np.geomspace(0.01, 80, 240)
    paper = schedule.PAPER
    z = (np.log(sigmas) - paper.p_mean) / paper.p_std
    curves.append(("equal probability (the paper's)", np.exp(-z * z / 2), schedule.equal_probability_edges(3)))
    share = schedule.information_share(table, sigmas, 512)
    slope = -np.gradient(share, np.log(sigmas))
    curves.append(
        (
            "equal information, ten classes",
            np.maximum(slope, 0) / slope.max(),
            schedule.equal_information_edges(table, 3, samples=512)[0],
        )
    )
    parts = []
    for k, (name, heights, edges) in enumerate(curves):
        left, top, width, height = 30 + k * 350, 50, 310, 150

        def at(s: float, left: int = left, width: int = width) -> float:
            return left + width * (np.log(s) - np.log(sigmas[0])) / (np.log(sigmas[-1]) - np.log(sigmas[0]))

        parts.append(text(left, 30, name, anchor="start", size=15))
        for b, (high, low) in enumerate(pairwise(edges)):
            a, c = at(max(low, sigmas[0])), at(min(high, sigmas[-1]))
            parts.append(
                f'<rect x="{a:.1f}" y="{top}" width="{c - a:.1f}" height="{height}" fill="{COLOURS[b]}" fill-opacity=".16"/>'
            )
            if c - a > 14:
                parts.append(
                    text((a + c) / 2, top + 14, f"block {b}" if c - a > 50 else str(b), size=12, colour=COLOURS[b])
                )
        line = " ".join(f"{at(s):.1f},{top + height - 120 * h:.1f}" for s, h in zip(sigmas, heights, strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{GREY}" stroke-width="2"/>')
        for s in (0.01, 0.1, 1, 10):
            parts.append(text(at(s) + (12 if s == 0.01 else 0), top + height + 18, f"{s:g}", size=12, colour=GREY))
        parts.append(text(left + width / 2, top + height + 36, "sigma (logarithmic)", size=12, colour=GREY))
    return page(250, "Two ways to divide the noise levels among three blocks", parts)


def contexts() -> str:
    """What a block knows of the input, three ways."""
    parts = []
    said = (
        ("frozen", "the original's state at that depth", "f"),
        ("carry", "what the converted block before it made", "c"),
        ("stem", "the stem's output alone", "s"),
    )
    for k, (name, what, kind) in enumerate(said):
        y = 36 + k * 120
        parts.append(text(20, y - 12, name, anchor="start", size=15))
        parts.append(text(90, y - 12, what, anchor="start", size=13, colour=GREY))
        parts.append(box(20, y + 22, 70, 40, "stem"))
        for b in range(3):
            x = 190 + b * 180
            parts.append(box(x, y + 22, 90, 40, f"block {b}", COLOURS[b]))
            if b == 0:
                parts.append(arrow(90, y + 42, x - 1, y + 42))
            elif kind == "c":
                parts.append(arrow(x - 90, y + 42, x - 1, y + 42))
            elif kind == "f":
                parts.append(box(x - 62, y + 27, 34, 30, "", COLOURS[b - 1]))
                parts.append(text(x - 45, y + 47, f"{b - 1}°", size=12))
                parts.append(arrow(x - 28, y + 42, x - 1, y + 42))
                if b == 2:
                    parts.append(
                        f'<path d="M{x - 225} {y + 27} C {x - 200} {y + 2}, {x - 90} {y + 2}, {x - 47} {y + 25}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#tip)"/>'
                    )
                else:
                    parts.append(
                        f'<path d="M90 {y + 30} C 150 {y - 2}, {x - 100} {y - 2}, {x - 47} {y + 25}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#tip)"/>'
                    )
            else:
                parts.append(
                    f'<path d="M90 {y + 50} C 150 {y + 92}, {x - 60} {y + 92}, {x + 30} {y + 64}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#tip)"/>'
                )
    parts.append(
        text(
            20,
            390,
            "0° and 1°: the original blocks, not modulated and not trained",
            anchor="start",
            size=12,
            colour=GREY,
        )
    )
    return page(404, "The three contexts", parts)


def memory() -> str:
    """What is in memory while one block of four trains, against all."""
    rows = (("end to end", 4), ("one block of four", 1))
    kinds = (
        ("weights", 1, COLOURS[0]),
        ("gradients", 1, COLOURS[1]),
        ("Adam's moments", 2, COLOURS[2]),
        ("activations", 3, COLOURS[3]),
    )
    parts = []
    unit = 560 / 28
    for k, (name, blocks) in enumerate(rows):
        y = 40 + k * 84
        parts.append(text(20, y - 8, name, anchor="start", size=15))
        x = 20.0
        for _, size, colour in kinds:
            w = size * blocks * unit
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="38" fill="{colour}" fill-opacity=".25" stroke="{colour}"/>'
            )
            x += w
        if blocks == 1:
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{unit:.1f}" height="38" fill="{GREY}" fill-opacity=".25" stroke="{GREY}"/>'
            )
    x = 20.0
    for name, _, colour in (*kinds, ("stem and head", 0, GREY)):
        parts.append(f'<rect x="{x:.0f}" y="186" width="14" height="14" fill="{colour}" fill-opacity=".4"/>')
        parts.append(text(x + 20, 198, name, anchor="start", size=13))
        x += 36 + 8 * len(name)
    return page(216, "Memory of training, end to end and one block at a time", parts)


def pictures() -> Iterator[tuple[str, str]]:
    """Names and contents."""
    yield from (("chain", chain()), ("partition", partition()), ("contexts", contexts()), ("memory", memory()))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, drawn in pictures():
        (FOLDER / f"{name}.svg").write_text(drawn, encoding="utf-8")
