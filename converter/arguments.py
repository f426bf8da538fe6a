"""What a denoiser's argument is likely to be, by its name, and how to make one: shapes as axes, and the sizes of axes from a config.

Nothing here is known to fit. :mod:`trial` runs the model on these guesses, corrects them and adds what is lacking.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BATCH, LENGTH, SIDE, FRAMES, SOUND = 3, 16, 16, 2, 6
"""Batch of the example, and the sizes where the config names none: text tokens, pixels or tokens a side of an image, frames, audio tokens."""
WIDTHS = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127)
"""First guesses of widths nobody named: primes, so that the number in a layer's refusal tells which argument it is about."""

Axis = int | str


@dataclass(frozen=True)
class Form:
    """A tensor ``[batch, *axes]``; ``channels`` is the axis that is the argument's own, the others are named in :class:`Sizes`.

    ``fixed``: no input, since it has no batch (a table of positions, a number of frames). ``layers``: taken as a list of tensors, one for each
    entry of the first axis after the batch.
    """

    axes: tuple[Axis, ...] = ()
    kind: str = "normal"
    fixed: bool = False
    layers: bool = False


def form(*axes: Axis, kind: str = "normal", fixed: bool = False, layers: bool = False) -> Form:
    return Form(axes, kind, fixed, layers)


MAIN = (
    form("channels", "height", "width"),
    form("tokens", "channels"),
    form("channels", "frames", "height", "width"),
    form("frames", "channels", "height", "width"),
    form("frames", "height", "width", "channels"),
    form("channels", "length"),
    form("tokens", kind="integers"),
    form("height", "width", kind="integers"),
    form("channels"),
    form("channels", 1, "height", "width"),
)
"""Layouts of the first argument: an image, its tokens, a video (channels first, frames first, channels last), a sound, codes, a vector, one frame."""
LIKE_MAIN = Form(kind="as the first argument")
TIME = (form(kind="unit"), form(kind="integers"), form("frames", kind="unit"), form(1, "frames", kind="unit"))
MASK = tuple(form(axis, kind=kind) for axis in ("text", "tokens") for kind in ("ones", "true", "real ones"))
TEXT = (
    form("text", "channels"),
    form("layers", "text", "channels"),
    form("text", "layers", "channels"),
    form("layers", "text", "channels", layers=True),
    form(1, "text", "channels"),
)
VECTOR = (form("channels"), form(1, "channels"), form("text", "channels"))
RULES: tuple[tuple[str, tuple[Form, ...]], ...] = (
    (r"^added_cond_kwargs$", (form(kind="empty", fixed=True),)),
    (r"kwargs|return_dict|cache|controlnet|residual|block|rotary|(video|audio)_coords|timestep_cond|skip_layers", ()),
    (r"^padding_mask$", (form(1, 1, "height", "width", kind="zeros", fixed=True),)),
    (r"_drop$", (form("tokens", kind="false"),)),
    (r"mask", MASK),
    (r"^t$|timesteps?(_r|_ratio)?$|noise_time$|sigma$|^guidance$|^ofs$|^fps$", TIME),
    (r"labels$", (form(kind="integers"), form(kind="unit"), form("channels"))),
    (r"(original|target)_size$|crop_coords$|^resolution$", (form(2),)),
    (r"^aspect_ratio$", (form(1),)),
    (r"^time_ids$", (form(6),)),
    (r"^added_time_ids$", (form(3),)),
    (r"^micro_conds$", (form(5),)),
    (r"^(img|image)_ids$", (form("tokens", "axes", kind="grid", fixed=True),)),
    (r"^(txt|text)_ids$", (form("text", "axes", kind="zeros", fixed=True),)),
    (r"^position_ids$", (form("text and tokens", "axes", kind="grid", fixed=True), form("tokens", 3, kind="integers"))),
    (r"^indices_latents", (form("frames", kind="count", fixed=True),)),
    (r"^text_rope_pos$", (form("text", kind="count", fixed=True),)),
    (r"^visual_rope_pos$", (form("frames", "rows", "columns", kind="counts", fixed=True),)),
    (r"_ids?$|indicator$|_indices$", (form("tokens", kind="integers"), form("text", kind="integers"))),
    (r"^text_lens$", (form(kind="length"),)),
    (r"pooled|^global_|^text_embeds$|image_embeddings|id_cond|_embedding$", VECTOR),
    (r"encoder_hidden_states|^text|cap_feats|image_embeds|^encodings|_embeds$", TEXT),
    (r"^audio_hidden_states$", (form("sound", "channels"),)),
    (r"^(audio_)?num_frames$", (form("frames", kind="size", fixed=True), form("sound", kind="size", fixed=True))),
    (r"^(height|width)$", (form("height", kind="size", fixed=True),)),
    (r"^img_shapes$", (form("height", "width", kind="shapes", fixed=True),)),
    (r"hidden_states|latents|cond$|pixel|tokens$", (LIKE_MAIN,)),
)
"""Forms of an argument whose name matches, likeliest first; the first pattern that matches counts, and no forms means never given."""

ENTRIES = ("text_embeds", "time_ids", "image_embeds", "resolution", "aspect_ratio")
"""Names of what is taken as an entry of an argument that is a dict."""


def forms_of(name: str, main: Form, config: Mapping[str, Any]) -> tuple[Form, ...]:
    """The forms of an argument where the first argument has the form ``main``; the config's own value where it has a key of that name."""
    for pattern, forms in RULES:
        if re.search(pattern, name):
            return tuple(main if f is LIKE_MAIN else f for f in forms)
    return (form(kind="config", fixed=True),) if config.get(name) is not None else ()


class Sizes:
    """Sizes of axes, from a config and from whether the first argument is a row of tokens."""

    def __init__(self, config: Mapping[str, Any], arguments: Sequence[str]) -> None:
        self.config, self.arguments = config, arguments

    def first(self, *keys: str, default: Any = None) -> Any:
        """The value of the first key that has one."""
        return next((self.config[k] for k in keys if self.config.get(k) not in (None, False)), default)

    def channels(self) -> int:
        """Width of the first argument, where a key names it."""
        found = self.first(
            "audio_acoustic_hidden_dim",
            "in_channels",
            "in_visual_dim",
            "latent_dim",
            "embedding_dim",
            "io_channels",
            "input_dims",
        )
        return found if isinstance(found, int) else WIDTHS[0]

    def of(self, axis: Axis, name: str, tokens: bool) -> int:
        """The size of an axis (other than ``channels``) of the argument ``name``."""
        if isinstance(axis, int):
            return axis
        found: dict[str, Callable[[], int]] = {
            "text": lambda: self._text(name),
            "frames": self._frames,
            "height": lambda: self._grid()[0] if tokens else self._sides()[0],
            "width": lambda: self._grid()[1] if tokens else self._sides()[1],
            "rows": lambda: self._grid()[0],
            "columns": lambda: self._grid()[1],
            "length": lambda: self._sides()[1],
            "tokens": self._tokens,
            "text and tokens": lambda: self._text(name) + self._tokens(),
            "sound": lambda: SOUND,
            "axes": lambda: len(self.first("axes_dims_rope", "axes_dims", "axes_dim", default=(0, 0, 0))),
            "layers": lambda: int(self.first("num_text_layers", default=0)) or self._layers(),
        }
        return found[axis]()

    def _text(self, name: str) -> int:
        """Text tokens; a second text's key ends as its argument does (``_t5``, ``_2``)."""
        end = re.search(r"_(t5|\d)$", name)
        suffix = end.group(0) if end else ""
        keys = ("text_len", "max_text_seq_length", "max_sequence_length", "num_embeddings")
        return int(self.first(*(k + suffix for k in keys), default=LENGTH))

    def _sides(self) -> tuple[int, int]:
        size = self.first("sample_size")
        if isinstance(size, (list, tuple)):
            return int(size[-2 if len(size) > 1 else 0]), int(size[-1])
        if size is not None:
            return int(size), int(size)
        return int(self.first("sample_height", default=SIDE)), int(self.first("sample_width", default=SIDE))

    def _frames(self) -> int:
        parts = self.first("chunk_partition")
        if parts is not None:
            return int(sum(parts))
        frames = int(self.first("video_length", "sample_frames", "num_frames", default=FRAMES))
        ratio, patch = self.first("temporal_compression_ratio"), self.first("patch_size_t", default=1)
        frames = (frames - 1) // int(ratio) + 1 if ratio else frames
        return frames + -frames % int(patch)

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        patch = self.first("patch_size", default=1)
        side = int(patch[-1] if isinstance(patch, (list, tuple)) else patch)
        rows, columns = self._sides()
        return max(rows // side, 1), max(columns // side, 1)

    def _tokens(self) -> int:
        rows, columns = self._grid()
        return rows * columns * (self._frames() if "num_frames" in self.arguments else 1)

    def _layers(self) -> int:
        return sum(int(self.first(k, default=0)) for k in ("num_layers", "num_single_layers")) or 2


def make(made: Form, dims: Sequence[int], value: Any = None) -> Any:
    """A value of a form whose axes have the sizes ``dims``; ``value`` is the config's, where the form is its value."""
    generator = torch.Generator().manual_seed(0)
    shape = list(dims) if made.fixed else [BATCH, *dims]
    makers: dict[str, Callable[[], Any]] = {
        "normal": lambda: torch.randn(shape, generator=generator),
        "unit": lambda: torch.rand(shape, generator=generator) * 0.9 + 0.05,
        "integers": lambda: torch.randint(0, 2, shape, generator=generator),
        "ones": lambda: torch.ones(shape, dtype=torch.long),
        "false": lambda: torch.zeros(shape, dtype=torch.bool),
        "true": lambda: torch.ones(shape, dtype=torch.bool),
        "real ones": lambda: torch.ones(shape),
        "zeros": lambda: torch.zeros(shape),
        "length": lambda: torch.full(shape, LENGTH),
        "grid": lambda: _grid(*dims),
        "count": lambda: torch.arange(dims[0]),
        "counts": lambda: [torch.arange(d) for d in dims],
        "size": lambda: dims[0],
        "shapes": lambda: [[(1, *dims)]],
        "empty": dict,
        "config": lambda: value,
    }
    return makers[made.kind]()


def _grid(tokens: int, axes: int) -> torch.Tensor:
    """Positions of image tokens ``[tokens, axes]``: row and column in the second and third column."""
    found, index = torch.zeros(tokens, axes), torch.arange(tokens)
    side = max(math.isqrt(tokens), 1)
    found[:, 1], found[:, 2] = index // side, index % side
    return found
