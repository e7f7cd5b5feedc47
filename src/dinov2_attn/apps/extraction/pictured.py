"""The picture in an item of a dataset or in the result of a transform, checked."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2_attn.apps.viz.decoding import Decoded, decode, decode_open
from dinov2_attn.apps.viz.opening import MOST_PIXELS
from dinov2_attn.apps.viz.reading import Reading
from dinov2_attn.errors import InvalidInputError

# The keys of a dict that may hold its picture.
KEYS = ("image", "pixel_values")
KINDS = "a floating tensor (C, H, W), an image of Pillow's or a path"


class NoPicture(InvalidInputError):
    """An item has a type without a picture, as all items of its dataset may have."""


def pictured(found: Any, name: str, reading: Reading, max_pixels: int | None) -> Tensor | Decoded:
    """Return the picture in ``found``, the content of the item ``name``; open it if it is a path.

    Images are upright and have the channels of ``reading``. Raise ``NoPicture`` if there is none,
    and ``InvalidInputError`` if it has more than ``max_pixels``.
    """
    if isinstance(found, Decoded):
        return found
    if isinstance(found, Tensor):
        return _dense(found, name)
    if isinstance(found, Image.Image):
        _check_pixels(found.height, found.width, name, max_pixels)
        return decode_open(found, Path(name), reading)
    if isinstance(found, str | Path):
        return decode(Path(found), reading, max_pixels)
    if isinstance(found, tuple | list) and found:
        return pictured(found[0], name, reading, max_pixels)
    if isinstance(found, Mapping) and (key := next((k for k in KEYS if k in found), None)):
        return pictured(found[key], name, reading, max_pixels)
    raise _no_picture(found, name)


def checked(
    tensor: Tensor, name: str, patch_size: int, channels: int, max_pixels: int | None
) -> Tensor:
    """Return a tensor that a model can take.

    Raise ``NoPicture`` unless it is floating ``(C, H, W)`` with ``channels``. Raise
    ``InvalidInputError`` if it has no whole number of patches, or more than ``max_pixels``.
    """
    found = _described(tensor, name)
    if tensor.ndim != 3 or not tensor.is_floating_point():
        raise NoPicture("an image as a floating tensor (C, H, W)", found, _advice(tensor))
    if tensor.shape[0] != channels:
        raise NoPicture(
            f"an image (C, H, W) of {channels} channels, as the model takes",
            found,
            "Put the channels first, and convert to RGB.",
        )
    height, width = tensor.shape[1:]
    _check_pixels(height, width, name, max_pixels)
    if height % patch_size or width % patch_size or not height or not width:
        raise InvalidInputError(
            f"height and width to be multiples of the patch size {patch_size}",
            f"{name} of {height} × {width}",
            "Crop or resize it, for example in a transform.",
        )
    return tensor.contiguous()


def digest(picture: Tensor | Decoded) -> str:
    """Return a sha256 of the values of a picture, with their dtype and shape."""
    if isinstance(picture, Tensor):
        head = f"{picture.dtype} {tuple(picture.shape)}"
        content = picture.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        head, content = f"uint8 {picture.pixels.shape}", picture.pixels.tobytes()
    return hashlib.sha256(head.encode() + content).hexdigest()


@contextlib.contextmanager
def seeded(number: int) -> Iterator[None]:
    """Seed all generators with ``number``, and restore them afterwards.

    So augmentation is the same in every run and in every process.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _dense(tensor: Tensor, name: str) -> Tensor:
    """Return ``tensor`` as a plain tensor on the CPU, without its graph."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type == "meta":
        raise NoPicture(
            "a dense tensor with values", _described(tensor, name), "Make one: tensor.to_dense()."
        )
    return tensor.detach().as_subclass(Tensor).cpu()


def _described(tensor: Tensor, name: str) -> str:
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)
    return f"{name}: {str(tensor.dtype).removeprefix('torch.')} {shape}"


def _check_pixels(height: int, width: int, name: str, max_pixels: int | None) -> None:
    most = max_pixels or MOST_PIXELS
    if height * width > most:
        raise InvalidInputError(
            f"an image of at most {most:,} pixels",
            f"{name} of {height} × {width}",
            "Shrink it, or allow it with --max-pixels N.",
        )


def _advice(tensor: Tensor) -> str:
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        return "Take the only image of the batch: tensor[0]."
    if tensor.ndim == 4:
        return "Give the images of a batch one by one: list(tensor)."
    if tensor.ndim == 2:
        return "Add the channels: tensor.expand(3, -1, -1)."
    if tensor.is_floating_point():
        return "Give one image."
    return "Convert it: tensor.float() / 255, normalised as the model was trained."


def _no_picture(found: Any, name: str) -> NoPicture:
    expected = f"items that are {KINDS}, or have one first in a tuple or in a dict as {KEYS[0]!r}"
    advice = "Return one of them from a dataset of your own."
    if isinstance(found, Mapping):
        return NoPicture(f"{expected} or {KEYS[1]!r}", f"{name}, with {list(found)}", advice)
    if isinstance(found, np.ndarray):
        advice = (
            "Give Image.fromarray(array) for uint8 (H, W, 3), torch.from_numpy(array) for "
            "floats (C, H, W)."
        )
    return NoPicture(f"{expected} or {KEYS[1]!r}", f"{name}, a {type(found).__name__}", advice)
