"""Decoding one image, in any process: pixels in the form that the model takes, or a reason."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinov2_attn.apps.extraction.items import Item
from dinov2_attn.apps.viz.decoding import Decoded, decode, decode_open
from dinov2_attn.apps.viz.images import ImageSize, fit, fitted_size
from dinov2_attn.apps.viz.inference import summary_of
from dinov2_attn.apps.viz.reading import IMAGENET, Reading
from dinov2_attn.apps.viz.videos import FrameReader, is_video, times_of
from dinov2_attn.errors import Dinov2AttnError, UnreadableFileError, in_one_line, is_failure

Size = tuple[int, int]
T = TypeVar("T")
Outcome_co = TypeVar("Outcome_co", covariant=True)


class OfItems(Protocol[Outcome_co]):
    """Makes something of numbered items, in any process, or gives the reason why not."""

    def __getitem__(self, numbered: tuple[int, Item]) -> Outcome_co | Refused: ...


@dataclass(frozen=True)
class Origin:
    """The number of an image, the digest of its file, and its size when upright."""

    number: int
    item: Item
    sha256: str
    size: Size


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of whole patches.

    ``pixels`` are uint8 ``(H, W, C)``, to be normalised, or a floating tensor ``(C, H, W)`` that
    the model takes unchanged. ``doubt`` describes a doubtful range of values.
    """

    origin: Origin
    pixels: npt.NDArray[np.uint8] | Tensor
    doubt: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker would send a tensor by a name in shared memory, which stays if it is killed.
        if not isinstance(self.pixels, Tensor):
            return Picture, (self.origin, self.pixels, self.doubt)
        content = self.pixels.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        form = (self.pixels.dtype, tuple(self.pixels.shape))
        return _received, (self.origin, content, *form, self.doubt)

    @property
    def sides(self) -> Size:
        """Height and width."""
        height, width = (
            self.pixels.shape[-2:] if isinstance(self.pixels, Tensor) else self.pixels.shape[:2]
        )
        return height, width


def _received(
    origin: Origin,
    content: npt.NDArray[np.uint8],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    doubt: str | None,
) -> Picture:
    return Picture(origin, torch.from_numpy(content).view(dtype).reshape(shape), doubt)


@dataclass(frozen=True)
class Refused:
    """An image without maps, with the reason and the stage that failed: ``decode`` or ``pass``."""

    number: int
    item: Item
    reason: str
    stage: str = "decode"


@dataclass(frozen=True)
class Decoder:
    """Decodes numbered items, as a ``torch.utils.data.Dataset`` whose keys they are.

    So a worker process receives one item at a time, and not the list of all images.
    """

    patch_size: int
    image_size: ImageSize
    max_pixels: int | None
    reading: Reading = IMAGENET

    def __getitem__(self, numbered: tuple[int, Item]) -> Picture | Refused:
        """Return the picture of an item, or the reason why it has none."""
        return or_refused(self._decode, *numbered)

    def _decode(self, number: int, item: Item) -> Picture:
        if is_video(Path(item.file)):
            return self._of_frame(number, item)
        content, path = item.read(self.max_pixels), Path(item.path)
        decoded = decode(path, self.reading, self.max_pixels, content)
        size = decoded.pixels.shape[0], decoded.pixels.shape[1]
        pixels = fit(decoded.pixels, self.patch_size, self.image_size, path)
        origin = Origin(number, item, hashlib.sha256(content).hexdigest(), size)
        return Picture(origin, pixels, decoded.doubt)

    def _of_frame(self, number: int, item: Item) -> Picture:
        decoded, sha256 = decode_frame(item, self.reading, self.max_pixels)
        size = decoded.pixels.shape[0], decoded.pixels.shape[1]
        pixels = fit(decoded.pixels, self.patch_size, self.image_size, Path(item.path))
        return Picture(Origin(number, item, sha256, size), pixels, decoded.doubt)


def decode_frame(item: Item, reading: Reading, max_pixels: int | None) -> tuple[Decoded, str]:
    """Return a frame of a video, and the sha256 of its pixels.

    Raises:
        UnreadableFileError: If the video is broken, which is one item without a frame.

    """
    path = Path(item.file)
    if item.frame is None:
        times_of(path)  # raises what is wrong with it
    pixels = _FRAMES(path, item.frame or 0, max_pixels)
    image = Image.fromarray(pixels)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return decode_open(image, Path(item.path), reading), digest


# Each process reads videos from the first frame to the last.
_FRAMES = FrameReader()


@dataclass(frozen=True)
class Measurer:
    """Measures numbered items by their headers, without decoding."""

    patch_size: int
    image_size: ImageSize
    max_pixels: int | None

    def __getitem__(self, numbered: tuple[int, Item]) -> Size | Refused:
        """Return height and width in patches, or the reason why there is no picture."""
        return or_refused(self._measure, *numbered)

    def _measure(self, _: int, item: Item) -> Size:
        path = Path(item.path)
        if is_video(Path(item.file)):
            size = decode_frame(item, IMAGENET, self.max_pixels)[0].pixels.shape[:2]
            return self._patches((size[0], size[1]), path)
        return self._patches(item.size(self.max_pixels), path)

    def _patches(self, size: Size, path: Path) -> Size:
        height, width = fitted_size(size, self.patch_size, self.image_size, path)
        return height // self.patch_size, width // self.patch_size


def or_refused(decode: Callable[[int, Item], T], number: int, item: Item) -> T | Refused:
    """Return the result of ``decode``, or its error as a ``Refused``."""
    try:
        item.check()
        return decode(number, item)
    except Dinov2AttnError as error:
        return Refused(number, item, in_one_line(error))
    except BaseException as error:  # out of memory, any exception of a library, a panic in Rust
        if not is_failure(error):
            raise
        reason = UnreadableFileError(
            "an image that can be decoded",
            f"{item.path} ({summary_of(error)})",
            "Check that an image viewer opens it.",
        )
        return Refused(number, item, in_one_line(reason))
