"""Scoring and generation by a bundle of a causal language model (``--task lm``).

Keys and values of the positions so far are kept, for each step and pass, where the bundle has graphs for that. Otherwise, and where a text is longer than the model's length, the whole window is computed for every
token; what lies behind a position has no say in it, so a window is filled up with zeros. Both give the same: z of past positions comes out as it did, since the sampler starts from the same z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from diffusionblocks.runtime.bundle import Bundle
from diffusionblocks.runtime.continuing import Continuing
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.tokens import drawn
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
MASK = "attention_mask"


def score(
    bundle: Bundle, tokens: Any, *, mode: str | None = None, steps: int | None = None, cached: bool | None = None
) -> NDArray[np.float32]:
    """What each token is worth given those before it.

    Args:
        bundle: of a language model.
        tokens: integers [N, T], T at most the length the model was converted for.
        mode: ``exact`` or ``denoise``; the bundle's own where not given.
        steps: denoising steps.
        cached: compute the text's own positions alone, by the bundle's graphs for new positions; False: always the model's whole length. Where not given, if they are there.

    Returns:
        Nats, float32 [N, T - 1]: minus the log-probability of tokens 1 to T - 1.

    Raises:
        BadInput: no language model, or tokens that do not fit.
    """
    length, known = _length(bundle), _checked(bundle, tokens)
    if known.shape[1] < 2:
        raise BadInput("One token alone cannot be scored: the first has none before it.", hint="Give two or more.")
    with _continuing(bundle, len(known), mode, steps, cached if known.shape[1] < length else False) as text:
        if text is not None:
            log = _normalised(text(_inputs(bundle, known)))
    if text is None:
        log = _of_window(bundle, known, mode, steps)
    log = log[:, : known.shape[1] - 1]
    return np.asarray(-np.take_along_axis(log, known[:, 1:, None], axis=-1)[..., 0])


def generate(
    bundle: Bundle,
    prompt: Any,
    count: int,
    *,
    mode: str | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    cached: bool | None = None,
) -> Tokens:
    """Continue prompts.

    Args:
        bundle: of a language model.
        prompt: integers [N, P], all of one length.
        count: how many tokens to make.
        mode: ``exact`` or ``denoise``; the bundle's own where not given.
        steps: denoising steps of each token.
        temperature: what log-probabilities are divided by; 0 takes the likeliest.
        top_p: draw from the fewest tokens that have this probability together.
        seed: the same seed gives the same tokens, for each row whatever the others are.
        stop: tokens that end a row.
        cached: keep keys and values of past positions, up to the model's length; False: compute the whole window for each token. Where not given, if the bundle has graphs for it and the memory budget
            has room.

    Returns:
        int64 [N, up to count]; a row that has ended is filled up with the token that ended it.

    Raises:
        BadInput: no language model, a prompt that is empty or longer than the model's length, or settings out of range.
    """
    length, known = _length(bundle), _checked(bundle, prompt)
    if count < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise BadInput(
            f"count {count}, temperature {temperature}, top_p {top_p}.",
            hint="count is 1 or more, temperature 0 or more, top_p above 0 and at most 1.",
        )
    generators = [np.random.default_rng([seed, row]) for row in range(len(known))]
    ended = np.full(len(known), -1, np.int64)
    done = 0
    with ExitStack() as kept:
        text = kept.enter_context(_continuing(bundle, len(known), mode, steps, cached))
        for _ in range(count):
            if text is not None and known.shape[1] <= length:
                log = _normalised(text(_inputs(bundle, known[:, done:]))[:, -1])
                done = known.shape[1]
            else:
                kept.close()
                recent = known[:, -length:]
                log = _of_window(bundle, recent, mode, steps)[:, recent.shape[1] - 1]
            found = [drawn(row, g.random(), temperature, top_p) for row, g in zip(log, generators, strict=True)]
            made = np.where(ended >= 0, ended, np.asarray(found, np.int64))
            ended = np.where(np.isin(made, np.asarray(stop, np.int64)), made, ended)
            known = np.concatenate([known, made[:, None]], 1)
            if (ended >= 0).all():
                break
    return known[:, np.asarray(prompt).shape[1] :]


def _length(bundle: Bundle) -> int:
    manifest = bundle.manifest
    if manifest.task != "lm" or manifest.target is None:
        raise BadInput(
            f"This bundle is of the task {manifest.task}, not of a language model.",
            hint="Convert the model with --task lm.",
        )
    return manifest.target.positions[0]


def _checked(bundle: Bundle, tokens: Any) -> Tokens:
    array, target = np.asarray(tokens), bundle.manifest.target
    assert target is not None
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise BadInput(
            f"The tokens have the shape {array.shape} and the type {array.dtype}.", hint="Give integers [N, T]."
        )
    if array.shape[1] > target.positions[0]:
        raise BadInput(
            f"The text has {array.shape[1]} tokens; the model was converted for {target.positions[0]}.",
            hint="Give the last of them, or convert the model for a longer window (--example).",
        )
    if array.min() < 0 or array.max() >= target.num_classes:
        raise BadInput(
            f"The tokens reach from {array.min()} to {array.max()}; the model has 0 to {target.num_classes - 1}.",
            hint="Use the tokenizer the model was trained with.",
        )
    return array.astype(np.int64)


@contextmanager
def _continuing(
    bundle: Bundle, count: int, mode: str | None, steps: int | None, cached: bool | None
) -> Iterator[Continuing | None]:
    if cached is False:
        yield None
        return
    with bundle.continuing(count, mode, steps=steps) as text:
        if cached and text is None:
            raise BadInput(
                "Keys and values cannot be kept: the bundle has no graphs for that, or the memory budget has no room.",
                hint="Leave --cache out, or give a larger --memory-budget.",
            )
        yield text


def _inputs(bundle: Bundle, tokens: Tokens) -> dict[str, Any]:
    """All inputs of the network, each as long as ``tokens``."""
    first, *others = bundle.manifest.inputs
    unknown = [spec.name for spec in others if spec.name != MASK]
    if unknown:
        raise BadInput(
            f"The model also takes {', '.join(unknown)}, which a text does not give.",
            hint="Use Bundle.run with all inputs.",
        )
    return {first.name: tokens.astype(first.dtype), **{s.name: np.ones(tokens.shape, s.dtype) for s in others}}


def _of_window(bundle: Bundle, tokens: Tokens, mode: str | None, steps: int | None) -> NDArray[np.float32]:
    """Log-probabilities of the next token at every position of the model's whole length, [N, T, K]."""
    window = np.zeros((len(tokens), _length(bundle)), np.int64)
    window[:, : tokens.shape[1]] = tokens
    return _normalised(np.asarray(bundle.run(_inputs(bundle, window), mode, steps=steps), np.float32))


def _normalised(found: NDArray[np.float32]) -> NDArray[np.float32]:
    top = found.max(-1, keepdims=True)
    return found - top - np.log(np.exp(found - top).sum(-1, keepdims=True))
