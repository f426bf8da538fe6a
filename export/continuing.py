"""The pieces of a causal language model for new positions: what each piece's inputs hold follows from the pieces before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffusionblocks.export.graph import CachedPiece, Exporter, Piece
from diffusionblocks.export.positions import NEW, Axes, NoForm
from diffusionblocks.runtime.cached import with_positions

if TYPE_CHECKING:
    from diffusionblocks.export.bundle import NetworkParts

STREAM = ("stream", "stream_out")


def cached_pieces(export: Exporter, parts: NetworkParts, target_export: Exporter) -> dict[int, CachedPiece]:
    """For each piece of a language model, by its identity, its form for new positions; none for other networks.

    Raises:
        NoForm: one of the pieces has none, so that the others would be of no use.
    """
    target = parts.target
    if parts.task != "lm" or target is None or len(target.positions) != 1:
        return {}
    length = target.positions[0]
    found: dict[int, CachedPiece] = {}

    def through(piece: Piece, env: Mapping[str, Axes], exporter: Exporter = export) -> dict[str, Axes]:
        """The environment behind a piece."""
        missing = [name for name in piece.inputs if name not in env]
        if missing:
            raise NoForm(f"the piece reads {missing[0]}, which no piece before it makes")
        made = found[id(piece)] = exporter.cached(piece, env, length)
        outputs = dict(made.outputs)
        stream = outputs.pop(STREAM[1], env.get(STREAM[0], ()))
        return {**env, STREAM[0]: stream, **outputs}

    moving = with_positions(parts.inputs, length)
    inputs: dict[str, Axes] = {
        spec.name: tuple(NEW if k == 1 and spec.name in moving else None for k in range(len(spec.shape)))
        for spec in parts.inputs
    }
    levels: dict[str, Axes] = {"z": (None, NEW, None), "sigma": (None,), "sigma_next": (None,)}
    first = env = through(parts.stem, inputs)
    carried = first[STREAM[0]]
    ends = []
    for block in parts.blocks:
        own = first if block.stem is None else through(block.stem, inputs)
        entered = {"stem": own, "frozen": env, "carry": {**env, STREAM[0]: carried}}[parts.context]
        if block.block is not None:
            behind = through(block.block, {**entered, **levels})
            carried = behind.get("stream_carry", behind[STREAM[0]])
            through(block.head, behind) if block.head is not None else ends.append(behind)
        if block.context is not None:
            env = through(block.context, env)
    ends += [env] if parts.exact else []
    if len({end[STREAM[0]] for end in ends}) > 1:
        raise NoForm("the head reads positions at several axes")
    through(parts.head, ends[-1] if ends else env)
    f = found[id(parts.head)].outputs
    through(target.piece, {**levels, "f": f[parts.head.outputs[0]]}, target_export)
    return found
