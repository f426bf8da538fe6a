"""FlexAttention as plain tensor operations, and nothing compiled meanwhile.

``torch.nn.attention.flex_attention`` calls torch.compile by itself and refuses gradients on a CPU; torch.export neither enters what is compiled nor takes its operator apart.
What is written here are the operations of its own eager implementation, in its order, so that the numbers are the same to the bit.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

log = logging.getLogger(__name__)

Modification = Callable[..., torch.Tensor]
MODULE = "torch.nn.attention.flex_attention"
INNER = ("flex_attention_hop", "create_mask", "setup_compilation_env", "_validate_device")
"""What the module calls for the work, for a mask of all places, to leave the modes that record what is exported, and to refuse gradients."""


@contextmanager
def plain() -> Iterator[None]:
    """What is compiled runs as it is written, and FlexAttention, where the process has loaded it, in plain operations."""
    flex = sys.modules.get(MODULE)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if flex is not None and all(hasattr(flex, name) for name in INNER):
            made = (
                _operator,
                functools.partial(dense, flex.create_mask),
                lambda: nullcontext("eager"),
                lambda *_: None,
            )
            for name, function in zip(INNER, made, strict=True):
                stack.enter_context(patch.object(flex, name, function))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            warnings.filterwarnings("ignore", message="torch.compile is ignored when called inside")
        yield


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Modification,
    block_mask: tuple[Any, ...],
    scale: float,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention with changed scores.

    Args:
        query, key, value: [N, heads, length, channels]; the keys' heads and N divide the query's.
        score_mod: (score, row, head, place of the query, place of the key), all scalars, to the changed score.
        block_mask: its last is (row, head, place of the query, place of the key) to whether they see each other.

    Returns:
        The result [N, heads, length, channels], and the logarithm of the sum, and the maximum, of the exponentials of the scores [N, heads, length], both to base 2.
    """
    if getattr(block_mask[-1], "__name__", "") == "noop_mask" and block_mask[3].shape[-1] > 1:
        _say_dense()
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1).expand(query.shape[0], -1, -1, -1) for t in (key, value))
    working = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = ((query.to(working) @ key.to(working).transpose(-2, -1)) * scale).to(working)
    places = [torch.arange(size, device=scores.device) for size in scores.shape]
    seen, scores = (_one_by_one if type(query) is torch.Tensor else _at_once)(block_mask[-1], score_mod, scores, places)
    scores = torch.where(seen, scores, -math.inf)
    found = torch._safe_softmax(scores, dim=-1).to(query.dtype) @ value.to(query.dtype)
    return found, scores.logsumexp(-1) / math.log(2), scores.amax(-1) / math.log(2)


def _operator(*args: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return attend(*args)


def dense(
    original: Modification,
    mod_fn: Modification,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
) -> torch.Tensor:
    """``create_mask`` of FlexAttention, whose names the arguments have: [B, H, Q_LEN, KV_LEN], true where a place of the keys is seen."""
    shape = (B or 1, H or 1, Q_LEN, KV_LEN)
    places = [torch.arange(size, device=device) for size in shape]
    if type(places[0]) is torch.Tensor or len(inspect.signature(mod_fn).parameters) != len(places):
        return original(mod_fn, *shape, device)
    return mod_fn(*_shaped(places)).expand(shape)


@functools.cache
def _say_dense() -> None:
    log.warning(
        "A block mask of this model has no mask function: every place sees every other, as where FlexAttention is not compiled. Compiled, it leaves out whole blocks."
    )


def _one_by_one(
    mask_mod: Modification, score_mod: Modification, scores: torch.Tensor, places: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both functions get scalars, as torch gives them."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    def everywhere(function: Modification, before: int) -> Modification:
        for place in (3, 2, 1, 0):
            function = torch.vmap(function, (*(0,) * before, *(0 if k == place else None for k in range(4))))
        return function

    with TransformGetItemToIndex():
        return everywhere(mask_mod, 0)(*places), everywhere(score_mod, 1)(scores, *places)


def _at_once(
    mask_mod: Modification, score_mod: Modification, scores: torch.Tensor, places: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both get all places as tensors of four dimensions, since torch.export records the levels of torch.vmap. What is no elementwise function differs, which a comparison with the model shows."""
    shaped = _shaped(places)
    return mask_mod(*shaped), score_mod(scores, *shaped)


def _shaped(places: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.reshape([-1 if k == axis else 1 for k in range(4)]) for axis, p in enumerate(places)]
