"""One image as a model's input, by Pillow and NumPy alone: read, made upright and coloured, resized, cut, scaled, normalised.

The steps and their order are those of ``timm.data.create_transform`` (evaluation) and of transformers' image processors; which apply is said by a
:class:`preprocessing.Preprocessing` that was made for the model's input (``sized``).
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.converter.preprocessing import INTERPOLATIONS, Preprocessing
from diffusionblocks.converter.saved import one_line
from diffusionblocks.converter.unreadable import Unreadable

Array = np.ndarray[Any, Any]


def image_array(content: bytes | Path, preparing: Preprocessing) -> Array:
    """An image file as float32 [C, H, W].

    Raises:
        Unreadable: not an image, truncated, or of a kind whose range of values is unknown.
    """
    return prepare(read_image(content, preparing.input_size[0] if preparing.input_size else 3), preparing)


def read_image(content: bytes | Path, channels: int) -> Any:
    """A Pillow image in mode RGB (3 channels) or L (1), upright, 8 bits a channel.

    Raises:
        Unreadable: see :func:`image_array`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
                opened.load()
                return _coloured(ImageOps.exif_transpose(opened), opened.format, channels)
    except UnidentifiedImageError as error:
        raise Unreadable("not an image") from error
    except FileNotFoundError as error:
        raise Unreadable("no such file") from error
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, struct.error) as error:
        text = one_line(error, 80)
        raise Unreadable("truncated" if "truncated" in text else text or type(error).__name__) from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Unreadable("too large to decode") from error


def _coloured(image: Any, file_format: str | None, channels: int) -> Any:
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values.clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise Unreadable(f"pixels of mode {image.mode}, whose range is unknown")
    elif image.mode in ("P", "PA"):  # by way of RGBA: a palette may have transparent colours
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def prepare(image: Any, preparing: Preprocessing) -> Array:
    """A Pillow image (RGB or L) as float32 [C, H, W]."""
    pixels = np.asarray(_resized(image, preparing))  # [H, W] or [H, W, C], uint8
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if preparing.input_size is not None:
        pixels = _centre(pixels, preparing.input_size[1], preparing.input_size[2], preparing)
    if preparing.bgr:
        pixels = pixels[::-1]
    values = pixels.astype(np.float32) * np.float32(preparing.scale)
    if preparing.mean is not None and preparing.std is not None:
        mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (preparing.mean, preparing.std))
        values = (values - mean) / std
    return np.ascontiguousarray(values, np.float32)


def _resized(image: Any, preparing: Preprocessing) -> Any:
    to = preparing.resize_to
    if preparing.resize == "none" or to is None:
        return image
    wide, high = image.size
    if preparing.resize == "exact":
        height, width = to
    elif preparing.resize == "shortest" and to[0] == to[1]:
        long = int(to[0] * max(wide, high) / min(wide, high))
        height, width = (long, to[0]) if wide <= high else (to[0], long)
    else:
        pick = min if preparing.resize == "shortest" else max
        ratio = pick(high / to[0], wide / to[1])
        height, width = max(round(high / ratio), 1), max(round(wide / ratio), 1)
    if (wide, high) == (width, height):
        return image
    return image.resize((width, height), INTERPOLATIONS.index(preparing.interpolation))


def _centre(pixels: Array, height: int, width: int, preparing: Preprocessing) -> Array:
    """The centre [C, height, width] of [C, H, W], padded where that is smaller."""
    low = preparing.half == "low"
    room = [max(want - have, 0) for want, have in zip((height, width), pixels.shape[1:], strict=True)]
    if any(room):
        top, left = ((r + 1) // 2 if low else r // 2 for r in room)
        canvas = np.empty((len(pixels), pixels.shape[1] + room[0], pixels.shape[2] + room[1]), pixels.dtype)
        canvas[:] = np.asarray(preparing.fill, pixels.dtype).reshape(-1, 1, 1)
        canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        pixels = canvas
    top, left = (
        (have - want) // 2 if low else round((have - want) / 2)
        for have, want in zip(pixels.shape[1:], (height, width), strict=True)
    )
    return pixels[:, top : top + height, left : left + width]
