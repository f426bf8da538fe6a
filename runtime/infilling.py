"""Texts by a bundle of a masked language model (``--task mdm``): filling in hidden tokens, and a bound on what a text is worth.

>>> from diffusionblocks.runtime import open_bundle
>>> from diffusionblocks.runtime.infilling import bound, fill
>>> with open_bundle("text.dblocks") as bundle:
...     text = fill(bundle, tokens, steps=32, seed=1)  # int64 [N, T]; tokens: the same, some of them the mask token
...     nats = bound(bundle, text)  # float64 [N]
"""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusionblocks.runtime import schedule
from diffusionblocks.runtime.bundle import Bundle, Callback
from diffusionblocks.runtime.errors import BadInput
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


def fill(
    bundle: Bundle,
    tokens: Any,
    *,
    mode: str | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    callback: Callback | None = None,
) -> Tokens:
    """Fill in the hidden tokens, from the share that is hidden down to none, on the blocks that own those shares (ancestral sampling of MD4: Shi et al. 2024).

    Args:
        bundle: of a masked language model.
        tokens: integers [N, T], T at most the length the model was converted for, hidden ones the mask token; or all of the network's inputs by name.
        mode: ``denoise``, one block a step, or ``exact``, the whole network; the bundle's own where not given.
        steps: number of steps, from 1; the bundle's own where not given.
        temperature: what log-probabilities are divided by; 0 takes the likeliest.
        top_p: draw from the fewest tokens that have this probability together.
        seed: the same seed gives the same tokens, for each row whatever the others are.
        callback: called after each step with (step, block, share, log-probabilities).

    Returns:
        int64 [N, T], no token of it hidden.

    Raises:
        BadInput: no masked language model, or tokens or settings that do not fit.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise BadInput(
            f"temperature {temperature}, top_p {top_p}.", hint="temperature is 0 or more, top_p above 0 and at most 1."
        )
    inputs, length = _inputs(bundle, tokens)
    with bundle.unmasking(inputs, mode) as (found, rows):
        share = float(found.shares().max())
        if share == 0:
            return np.asarray(found.tokens[:, :length], np.int64)
        count = bundle.manifest.decoding.steps if steps is None else steps
        plan = schedule.unmasking_steps(bundle.manifest.edges, count, share)
        made = found.run(plan, seed=seed, temperature=temperature, top_p=top_p, rows=rows, callback=callback)
    return made[:, :length]


def bound(
    bundle: Bundle, tokens: Any, *, mode: str | None = None, draws: int = 8, seed: int = 0
) -> NDArray[np.float64]:
    """An upper bound on the nats of texts: the ELBO (MD4: Shi et al. 2024), by Monte Carlo, without bias.

    Args:
        bundle: of a masked language model.
        tokens: integers [N, T], none hidden; or all of the network's inputs by name.
        mode: as in :func:`fill`.
        draws: of the hidden tokens, for each block; their shares are spread evenly over what the block owns.
        seed: of the draws.

    Returns:
        Nats of all T tokens together, float64 [N].

    Raises:
        BadInput: no masked language model, or tokens that do not fit.
    """
    if draws < 1:
        raise BadInput(f"{draws} draws were asked for.", hint="Give 1 or more.")
    inputs, _ = _inputs(bundle, tokens)
    with bundle.unmasking(inputs, mode) as (found, rows):
        true = found.tokens.astype(np.int64)
        if (true == found.masking.token).any():
            raise BadInput("A text to be scored holds hidden tokens.", hint="Fill them in first.")
        uppers = bundle.manifest.edges[:-1]
        order = list(range(len(uppers)))
        total = np.zeros(len(true))
        found.divide(len(true), rows)
        for block in order:
            upper, lower = uppers[block], 0.0 if block + 1 == len(uppers) else uppers[block + 1]
            generator = np.random.default_rng([seed, block])
            with found.opened(order, block) as chain:
                for i in range(draws):
                    share = float(lower + (upper - lower) * (i + generator.uniform(1e-9, 1)) / draws)
                    z = np.where(generator.random(true.shape) < share, found.masking.token, true)
                    total += found.bound(chain, z, share) * (upper - lower) / draws
    return total


def _inputs(bundle: Bundle, tokens: Any) -> tuple[dict[str, Any], int]:
    """The network's inputs, filled up to its length where it can be told to leave positions out; and how many of the tokens were given."""
    target = bundle.manifest.target
    masking = None if target is None else target.masking
    if masking is None or isinstance(tokens, dict):
        given = dict(tokens) if isinstance(tokens, dict) else {bundle.manifest.inputs[0].name: tokens}
        return given, int(next(iter(map(np.shape, given.values())), (0, 0))[-1])
    array, length = np.asarray(tokens), target.dim if target is not None else 0
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise BadInput(
            f"The tokens have the shape {array.shape} and the type {array.dtype}.", hint="Give integers [N, T]."
        )
    count = array.shape[1]
    if count > length or (count < length and not masking.mask):
        raise BadInput(
            f"The text has {count} tokens; the model was converted for {length}.",
            hint="Cut it to that length, or fill it up with the mask token."
            if count < length
            else "Cut it to that length, or convert the model for a longer one (--example).",
        )
    classes = target.num_classes if target is not None else 0
    odd = array[(array < 0) | ((array >= classes) & (array != masking.token))]
    if odd.size:
        raise BadInput(
            f"The tokens hold {int(odd[0])}; the model has 0 to {classes - 1}, and {masking.token} for a hidden one.",
            hint="Use the tokenizer the model was trained with.",
        )
    window = np.zeros((len(array), length), np.int64)
    window[:, :count] = array
    values: dict[str, Any] = {masking.input: window}
    for spec in bundle.manifest.inputs[1:]:
        if spec.name == masking.mask:
            seen = np.zeros(window.shape, spec.dtype)
            seen[:, :count] = 1
            values[spec.name] = seen
        elif spec.name == "token_type_ids":
            values[spec.name] = np.zeros(window.shape, spec.dtype)
    return values, count
