"""Decoding one image, in whatever process: pixels as the model sees them, or a reason."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_attn.dataset.items import Item
from dinov2_attn.errors import Dinov2AttnError, in_one_line
from dinov2_attn.show.images import ImageSize, fit, fitted_size, open_upright, stored_size

Size = tuple[int, int]


@dataclass(frozen=True)
class Origin:
    """Where an image comes from: its number among all, its file's digest, its size upright."""

    number: int
    item: Item
    sha256: str
    size: Size


@dataclass(frozen=True, eq=False)
class Picture:
    """An image cropped to whole patches: uint8 ``(H, W, 3)``."""

    origin: Origin
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Refused:
    """An image that cannot be read, and why."""

    number: int
    item: Item
    reason: str


@dataclass(frozen=True)
class Decoder:
    """Decodes numbered items, as a ``torch.utils.data.Dataset`` whose keys they are.

    So a worker process needs to know no more of a million images than the next one.
    """

    patch_size: int
    image_size: ImageSize
    max_pixels: int | None

    def __getitem__(self, numbered: tuple[int, Item]) -> Picture | Refused:
        """Return the picture of an item, or why there is none."""
        found: Picture | Refused = _or_refused(self._decode, *numbered)
        return found

    def _decode(self, number: int, item: Item) -> Picture:
        content, path = item.read(), Path(item.path)
        image = open_upright(path, self.max_pixels, content)
        size = image.height, image.width
        pixels = np.array(fit(image, self.patch_size, self.image_size, path))
        return Picture(Origin(number, item, hashlib.sha256(content).hexdigest(), size), pixels)


@dataclass(frozen=True)
class Measurer:
    """Measures numbered items by their headers, which takes no decoding."""

    patch_size: int
    image_size: ImageSize
    max_pixels: int | None

    def __getitem__(self, numbered: tuple[int, Item]) -> Size | Refused:
        """Return height and width in patches, or why there is no picture."""
        found: Size | Refused = _or_refused(self._measure, *numbered)
        return found

    def _measure(self, _: int, item: Item) -> Size:
        path = Path(item.file if item.place is None else item.path)
        size = stored_size(path, self.max_pixels, None if item.place is None else item.read())
        height, width = fitted_size(size, self.patch_size, self.image_size, path)
        return height // self.patch_size, width // self.patch_size


def _or_refused(decode: Callable[[int, Item], Any], number: int, item: Item) -> Any:
    try:
        item.check()
        return decode(number, item)
    except Dinov2AttnError as error:
        return Refused(number, item, in_one_line(error))
