"""Class numbers by class names."""

from __future__ import annotations

from collections.abc import Sequence

from diffusionblocks.runtime.errors import BadInput


def numbered(names: Sequence[str], known: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names in the order of their numbers, and each one's number: as ``known`` (a bundle's) has them, where that is given.

    Raises:
        BadInput: a name that ``known`` does not have.
    """
    if known is None:
        return tuple(names), {name: i for i, name in enumerate(names)}
    strange = [name for name in names if name not in set(known)]
    if strange:
        raise BadInput(
            f"The data has the classes {', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}, which the bundle does not have"
            f" ({', '.join(known[:5])}{' ...' if len(known) > 5 else ''}).",
            hint="Name the classes as the bundle does, or convert the model anew with this data.",
        )
    return tuple(known), {name: i for i, name in enumerate(known)}
