"""Decoding items that Python code makes: those of a dataset, or files with a transform.

Every picture in them is checked, so that an error names the item.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinov2_attn.apps.extraction.decode import (
    Origin,
    Picture,
    Refused,
    Size,
    decode_frame,
    or_refused,
)
from dinov2_attn.apps.extraction.items import Item
from dinov2_attn.apps.viz.decoding import Decoded, decode, decode_open
from dinov2_attn.apps.viz.images import ImageSize, fit
from dinov2_attn.apps.viz.opening import MOST_PIXELS, check_bytes
from dinov2_attn.apps.viz.reading import Reading
from dinov2_attn.apps.viz.videos import is_video
from dinov2_attn.errors import InvalidInputError, is_failure

# How many items are tried before anything is written. If none has a picture, none will.
FIRST = 3

# The keys of a dict that may hold its picture.
KEYS = ("image", "pixel_values")
KINDS = "a floating tensor (C, H, W), an image of Pillow's or a path"


@dataclass(frozen=True)
class Wanted:
    """The form of pictures that a model takes: whole patches, a reading, perhaps a size."""

    patch_size: int
    reading: Reading
    image_size: ImageSize
    max_pixels: int | None


@dataclass(frozen=True, eq=False)
class GivenDecoder:
    """Decodes numbered items, as ``Decoder`` does.

    Attributes:
        read: Returns the content of an item, and the sha256 of its file if it has one.
        transform: Makes another picture of it.
        wanted: The form that the model takes.
        stays: Whether ``read`` must not be sent to other processes.

    """

    read: Callable[[int, Item], tuple[object, str | None]]
    transform: Callable[[Any], Any] | None
    wanted: Wanted
    stays: bool = False

    def __getitem__(self, numbered: tuple[int, Item]) -> Picture | Refused:
        """Return the picture of an item, or the reason why it has none."""
        return or_refused(self.decode, *numbered)

    def decode(self, number: int, item: Item) -> Picture:
        """Return the picture of an item; raise any error of reading it."""
        most, reading, name = self.wanted.max_pixels, self.wanted.reading, item.path
        with _seeded(number):
            found, sha256 = self.read(number, item)
            before = picture = _pictured(found, name, reading, most)
            origin = Origin(number, item, sha256 or _digest(before), _sides(before))
            if self.transform is not None:
                picture = _pictured(self.transform(_to_transform(before)), name, reading, most)
        doubt = before.doubt if isinstance(before, Decoded) else None
        return Picture(origin, self._fitted(picture, name), doubt)

    def _fitted(self, picture: Tensor | Decoded, name: str) -> npt.NDArray[np.uint8] | Tensor:
        wanted = self.wanted
        if isinstance(picture, Decoded):
            return fit(picture.pixels, wanted.patch_size, wanted.image_size, Path(name))
        if wanted.image_size is not None:
            raise NoPicture(
                "images of Pillow's, since image_size was given",
                f"{name}, a tensor",
                "Leave image_size out, and resize in a transform.",
            )
        return _checked(
            picture, name, wanted.patch_size, wanted.reading.channels, wanted.max_pixels
        )


@dataclass(frozen=True, eq=False)
class ByDecoding:
    """Measures numbered items, as ``Measurer`` does, by decoding them."""

    decoder: GivenDecoder

    @property
    def stays(self) -> bool:
        """Whether items must not be sent to other processes."""
        return self.decoder.stays

    def __getitem__(self, numbered: tuple[int, Item]) -> Size | Refused:
        """Return height and width in patches, or the reason why there is no picture."""
        found = self.decoder[numbered]
        if isinstance(found, Refused):
            return found
        height, width = found.sides
        return height // self.decoder.wanted.patch_size, width // self.decoder.wanted.patch_size


@dataclass(frozen=True)
class FileReader:
    """Reads the images of files, upright and in a model's channels."""

    reading: Reading
    max_pixels: int | None

    def __call__(self, _: int, item: Item) -> tuple[Decoded, str]:
        """Return the image in a file, and the file's sha256."""
        if is_video(Path(item.file)):
            return decode_frame(item, self.reading, self.max_pixels)
        content = item.read(self.max_pixels)
        image = decode(Path(item.path), self.reading, self.max_pixels, content)
        return image, hashlib.sha256(content).hexdigest()


def check_first(decoder: GivenDecoder, items: Sequence[Item]) -> None:
    """Raise ``NoPicture`` if none of the first items has a picture of a known kind.

    Any other error concerns its own item only.
    """
    wrong: list[NoPicture] = []
    for number, item in enumerate(items[:FIRST]):
        try:
            item.check()
            decoder.decode(number, item)
        except NoPicture as error:
            wrong.append(error)
        except BaseException as error:  # the run lists it
            if not is_failure(error):
                raise
            return
    if len(wrong) == len(items[:FIRST]) > 0:
        raise wrong[0]


def _to_transform(
    picture: Tensor | Decoded,
) -> Tensor | Image.Image | npt.NDArray[np.uint8]:
    """Return a picture in the form that transforms take: a copy of a tensor, or Pillow's image.

    Pillow has no images of other than 1, 3 or 4 channels. Such pixels stay an array.
    """
    if isinstance(picture, Tensor):
        return picture.clone()  # a transform may work in place
    channels = picture.pixels.shape[2]
    if channels not in (1, 3, 4):
        return picture.pixels
    return Image.fromarray(picture.pixels[..., 0] if channels == 1 else picture.pixels)


def _sides(picture: Tensor | Decoded) -> Size:
    shape = picture.shape if isinstance(picture, Tensor) else picture.pixels.shape[:2]
    height, width = (1, 1, *shape)[-2:]
    return height, width


class NoPicture(InvalidInputError):
    """An item has a type without a picture, as all items of its dataset may have."""


def _pictured(
    found: object, name: str, reading: Reading, max_pixels: int | None
) -> Tensor | Decoded:
    """Return the picture in ``found``, the content of the item ``name``; open it if it is a path.

    Images are upright and have the channels of ``reading``. Raise ``NoPicture`` if there is none,
    and ``InvalidInputError`` if it has more than ``max_pixels``.
    """
    if isinstance(found, Decoded):
        return found
    if isinstance(found, Tensor):
        return _dense(found, name, max_pixels)
    if isinstance(found, Image.Image):
        _check_pixels(found.height, found.width, name, max_pixels)
        return decode_open(found, Path(name), reading)
    if isinstance(found, str | Path):
        return decode(Path(found), reading, max_pixels)
    if isinstance(found, tuple | list) and found:
        return _pictured(found[0], name, reading, max_pixels)
    if isinstance(found, Mapping) and (key := next((k for k in KEYS if k in found), None)):
        return _pictured(found[key], name, reading, max_pixels)
    raise _no_picture(found, name)


def _checked(
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


def _digest(picture: Tensor | Decoded) -> str:
    """Return a sha256 of the values of a picture, with their dtype and shape."""
    if isinstance(picture, Tensor):
        head = f"{picture.dtype} {tuple(picture.shape)}"
        content = picture.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        head, content = f"uint8 {picture.pixels.shape}", picture.pixels.tobytes()
    return hashlib.sha256(head.encode() + content).hexdigest()


@contextlib.contextmanager
def _seeded(number: int) -> Iterator[None]:
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


def _dense(tensor: Tensor, name: str, max_pixels: int | None) -> Tensor:
    """Return ``tensor`` as a plain tensor on the CPU, without its graph.

    Raise ``InvalidInputError`` if its values would take more than an image may. An expanded one
    takes no memory until it is read.
    """
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type == "meta":
        raise NoPicture(
            "a dense tensor with values", _described(tensor, name), "Make one: tensor.to_dense()."
        )
    check_bytes(Path(name), tensor.numel() * tensor.element_size(), max_pixels)
    return tensor.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg()


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


def _no_picture(found: object, name: str) -> NoPicture:
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
