"""How a model wants its rows prepared, as its own config says: one form for timm's and transformers' words, stored in a bundle's manifest.

Both libraries resize, cut out the centre, scale and normalise; they differ in how sizes are said and in which way half a pixel is rounded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffusionblocks.converter.saved import read_json
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

log = logging.getLogger(__name__)

RESIZES = ("shortest", "exact", "longest", "none")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters, in the order of its numbers, which transformers' ``resample`` is."""

_STEPS = ("resize", "center_crop", "rescale", "normalize", "convert_rgb", "flip_channel_order", "reduce_labels")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Preprocessing:
    """Steps of one image in their order, and the tokenizer of a text.

    ``input_size``: [channels, height, width] the numbers are for, None where no config names one; ``resize``: what becomes ``resize_to`` [height, width]: the
    shortest edge, both edges exactly, the longest edge, or nothing; then the centre of the input's size is cut out, padded with ``fill`` [0..255] a channel;
    ``half``: which pixel a centre between two is, ``even`` (timm) or ``low`` (transformers); ``scale``: what a pixel of 0..255 is multiplied by; ``mean``, ``std``: a
    channel's, after scaling; ``bgr``: channels in the order blue, green, red; ``tokenizer``: the folder of a tokenizer.
    """

    input_size: tuple[int, ...] | None = None
    resize: str = "exact"
    resize_to: tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    fill: tuple[int, ...] = (0,)
    half: str = "even"
    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bgr: bool = False
    tokenizer: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """What :meth:`to_json` wrote, or timm's words alone, as older bundles have them.

        Raises:
            BadInput: an unknown key, or a value that has no meaning here.
        """
        if "crop_pct" in data:
            return of_timm(data, None)
        known = {f.name for f in fields(cls)}
        if set(data) - known:
            raise BadInput(
                f"The preprocessing names {', '.join(sorted(set(data) - known))}; known are {', '.join(sorted(known))}.",
                hint="Convert the model again with this version.",
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        found = cls(**values)
        found.check()
        return found

    def check(self) -> None:
        """Raise BadInput where a value is none of those that are allowed."""
        for what, value, allowed in (
            ("resize", self.resize, RESIZES),
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("half", self.half, ("even", "low")),
        ):
            if value not in allowed:
                raise BadInput(
                    f"The preprocessing's {what} is {value!r}; known are {', '.join(allowed)}.",
                    hint="Convert the model again with this version.",
                )

    @property
    def has_image(self) -> bool:
        """Whether a config said how images are prepared."""
        return self.input_size is not None or self.mean is not None

    def sized(self, channels: int, height: int, width: int) -> Preprocessing:
        """The same for another size of input: sizes in proportion, statistics of one channel as the mean of all, of more as many."""
        to = self.resize_to or (height, width)
        if self.input_size is not None and self.resize_to is not None:
            was = self.input_size[1:]
            to = tuple(round(t * now / old) for t, now, old in zip(to, (height, width), was, strict=True))
        return replace(
            self,
            input_size=(channels, height, width),
            resize_to=to,
            mean=_spread(self.mean, channels),
            std=_spread(self.std, channels),
            fill=tuple(round(v) for v in _spread(self.fill, channels) or (0,)),
        )


def for_input(spec: TensorSpec, preparing: Preprocessing) -> tuple[Preprocessing, bool]:
    """The preprocessing for an input [N, C, H, W] or [N, H, W, C] of 1 or 3 channels, and whether the channels are last.

    Raises:
        BadInput: an input of another shape, or of no floating point.
    """
    shape = spec.shape[1:]
    if len(shape) == 3 and not all(isinstance(n, int) for n in shape) and preparing.input_size is not None:
        shape = preparing.input_size
    last = len(shape) == 3 and shape[0] not in (1, 3) and shape[2] in (1, 3)
    channels, height, width = (shape[2], *shape[:2]) if last else shape if len(shape) == 3 else (0, 0, 0)
    sizes = [n for n in (channels, height, width) if isinstance(n, int)]
    if len(sizes) < 3 or channels not in (1, 3) or "float" not in spec.dtype:
        raise BadInput(
            f"The data is images; the model takes {spec.name} {spec.dtype} {list(spec.shape)}, not [batch, 1 or 3, height, width].",
            hint="Give arrays of that shape (.npz), or convert the model with --input-shape CxHxW.",
        )
    if not preparing.has_image:
        log.warning(
            "the model came without a preprocessing config: images are resized to %dx%d and scaled to 0..1",
            height,
            width,
        )
    return preparing.sized(*sizes), last


def _spread(values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is None or len(values) == channels:
        return None if values is None else tuple(values)
    if len(values) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise BadInput(
        f"The preprocessing has {len(values)} means for an input of {channels} channels.",
        hint="Give the data as arrays (.npz), prepared as the model wants them.",
    )


def of_timm(config: Mapping[str, Any], shape: Sequence[int] | None) -> Preprocessing:
    """timm's ``pretrained_cfg``, as ``timm.data.create_transform`` reads it for evaluation; ``shape`` [channels, height, width] in place of its ``input_size``."""
    size = tuple(map(int, shape or config.get("input_size") or ())) or None
    crop = float(config.get("crop_pct") or 0.875)
    mode = str(config.get("crop_mode") or "center")
    mean = _numbers(config.get("mean"))
    interpolation = str(config.get("interpolation") or "bilinear")
    return Preprocessing(
        input_size=size,
        resize={"squash": "exact", "border": "longest"}.get(mode, "shortest"),
        resize_to=None if size is None else tuple(math.floor(n / crop) for n in size[1:]),
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bilinear",
        fill=tuple(round(255 * m) for m in mean) if mode == "border" and mean else (0,),
        mean=mean,
        std=_numbers(config.get("std")),
    )


def of_folder(folder: Path) -> Preprocessing | None:
    """What a folder that transformers saved says of images (``preprocessor_config.json``, ``processor_config.json``) and text (a tokenizer's files); None for
    neither.

    Raises:
        BadInput: a config that cannot be read.
    """
    found: Preprocessing | None = None
    for name in ("preprocessor_config.json", "processor_config.json"):
        if found is None and (folder / name).is_file():
            config = read_json(folder / name)
            inner = config.get("image_processor")
            config = inner if isinstance(inner, dict) else config
            if "image_mean" in config or "size" in config:
                found = of_transformers(config)
    if any((folder / name).is_file() for name in _TOKENIZERS):
        found = replace(found or Preprocessing(), tokenizer=str(folder.resolve()))
    return found


def of_transformers(config: Mapping[str, Any]) -> Preprocessing:
    """An image processor's config, as transformers' Pillow backend reads it. Steps that have no counterpart here are named by a warning."""
    known = {f"do_{step}" for step in _STEPS}
    unknown = sorted(k for k, v in config.items() if k.startswith("do_") and v is True and k not in known)
    if unknown:
        log.warning("the model's image processor also says %s, which is left out", ", ".join(unknown))
    resize, resize_to, size = _sizes(config)
    mean, std = _statistics(config)
    resample = config.get("resample", 2)
    fits = isinstance(resample, int) and 0 <= resample < len(INTERPOLATIONS)
    return Preprocessing(
        input_size=None if size is None else (3, *size),
        resize=resize,
        resize_to=resize_to,
        interpolation=INTERPOLATIONS[resample] if fits else "bilinear",
        half="low",
        scale=float(config.get("rescale_factor") or 1 / 255) if config.get("do_rescale", True) else 1.0,
        mean=mean,
        std=std,
        bgr=bool(config.get("do_flip_channel_order")),
    )


def _statistics(config: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std. EfficientNet's processor may subtract 1 before (``rescale_offset``) and divides by std once more (``include_top``)."""
    mean, std = (_numbers(config.get(key)) for key in ("image_mean", "image_std"))
    again = std if config.get("include_top") else None
    usual = (
        "do_flip_channel_order" not in config
    )  # MobileViT's processor does not, and then does not write that it does not
    if not config.get("do_normalize", usual) or mean is None or std is None:
        mean = std = None
    if config.get("rescale_offset"):
        mean, std = tuple(m + 1 for m in mean or (0.0,)), std or (1.0,)
    if again is not None:
        mean, std = mean or (0.0,), tuple(s * a for s, a in zip(std or (1.0,) * len(again), again, strict=True))
    return mean, std


def _numbers(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)


def _sizes(config: Mapping[str, Any]) -> tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]:
    """How to resize, to what, and the size that leaves the processor."""
    edge, size = _size(config.get("size"))
    crop = _size(config.get("crop_size"))[1] if config.get("do_center_crop") else None
    if not config.get("do_resize", True):
        return "none", None, crop
    if edge is None:
        log.warning("the model's image processor has the size %s: images are resized exactly", config.get("size"))
        return "exact", None, crop
    if size is not None:
        return "exact", size, crop or size
    square = (edge, edge)
    if config.get("crop_pct"):  # ConvNeXt's processor: below 384 it cuts the centre out, from there on it squeezes
        return ("shortest", (int(edge / config["crop_pct"]),) * 2, square) if edge < 384 else ("exact", square, square)
    return "shortest", square, crop or square


def _size(value: Any) -> tuple[int | None, tuple[int, int] | None]:
    """The shortest edge a config names, and height and width where it names both."""
    if isinstance(value, int):
        return value, (value, value)
    if isinstance(value, Mapping):
        if value.get("height") and value.get("width"):
            return int(value["height"]), (int(value["height"]), int(value["width"]))
        if value.get("shortest_edge") and value.get("longest_edge") is None:
            return int(value["shortest_edge"]), None
    return None, None
