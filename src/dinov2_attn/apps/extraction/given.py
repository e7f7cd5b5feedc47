"""Decoding items that Python code makes: those of a dataset, or files with a transform."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dinov2_attn.apps.extraction.decode import Origin, Picture, Refused, Size, or_refused
from dinov2_attn.apps.extraction.items import Item
from dinov2_attn.apps.extraction.pictured import NoPicture, checked, digest, pictured, seeded
from dinov2_attn.apps.viz.decoding import Decoded, decode
from dinov2_attn.apps.viz.images import ImageSize, fit
from dinov2_attn.apps.viz.reading import Reading

# How many items are tried before anything is written. If none has a picture, none will.
FIRST = 3


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

    read: Callable[[int, Item], tuple[Any, str | None]]
    transform: Callable[[Any], Any] | None
    wanted: Wanted
    stays: bool = False

    def __getitem__(self, numbered: tuple[int, Item]) -> Picture | Refused:
        """Return the picture of an item, or the reason why it has none."""
        found: Picture | Refused = or_refused(self.decode, *numbered)
        return found

    def decode(self, number: int, item: Item) -> Picture:
        """Return the picture of an item; raise any error of reading it."""
        most, reading, name = self.wanted.max_pixels, self.wanted.reading, item.path
        with seeded(number):
            found, sha256 = self.read(number, item)
            before = picture = pictured(found, name, reading, most)
            origin = Origin(number, item, sha256 or digest(before), _sides(before))
            if self.transform is not None:
                picture = pictured(self.transform(_to_transform(before)), name, reading, most)
        doubt = before.doubt if isinstance(before, Decoded) else None
        return Picture(origin, self._fitted(picture, name), doubt)

    def _fitted(self, picture: Tensor | Decoded, name: str) -> Any:
        wanted = self.wanted
        if isinstance(picture, Decoded):
            return fit(picture.pixels, wanted.patch_size, wanted.image_size, Path(name))
        if wanted.image_size is not None:
            raise NoPicture(
                "images of Pillow's, since image_size was given",
                f"{name}, a tensor",
                "Leave image_size out, and resize in a transform.",
            )
        return checked(picture, name, wanted.patch_size, wanted.reading.channels, wanted.max_pixels)


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
        content = item.read()
        image = decode(Path(item.path), self.reading, self.max_pixels, content)
        return image, hashlib.sha256(content).hexdigest()


def check_first(decoder: GivenDecoder, items: Sequence[Item]) -> None:
    """Raise ``NoPicture`` if none of the first items has a picture of a known kind.

    Any other error concerns its own item only.
    """
    wrong: list[NoPicture] = []
    for number, item in enumerate(items[:FIRST]):
        try:
            decoder.decode(number, item)
        except NoPicture as error:
            wrong.append(error)
        except Exception:  # the run lists it
            return
    if len(wrong) == len(items[:FIRST]) > 0:
        raise wrong[0]


def _to_transform(picture: Tensor | Decoded) -> Any:
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
