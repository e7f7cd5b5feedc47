"""Reading a photograph as a model wants it and as it is shown: the same crop, twice."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dinov2_attn.errors import InvalidInput, UnreadableFile

log = logging.getLogger(__name__)

# The mean and deviation of ImageNet's channels, with which every DINOv2 was trained.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

# An image of so many pixels takes 0.3 GB decoded and 1.2 GB as a tensor; its attention would
# take petabytes.
MOST_PIXELS = 100_000_000

# The published weights were trained up to here; the cost of attention grows with the
# fourth power of an image's side.
LARGEST_SHORT_SIDE = 518

ImageSize = int | tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Photograph:
    """An image cropped to whole patches.

    ``tensor``: float32 (3, H, W), normalised. ``picture``: uint8 (H, W, 3), as shown.
    """

    tensor: Tensor
    picture: npt.NDArray[np.uint8]


def read_photograph(
    path: Path,
    patch_size: int,
    image_size: ImageSize = None,
    max_pixels: int | None = None,
) -> Photograph:
    """Read the image at ``path``, resize it, crop it to whole patches.

    It comes upright, in RGB: 16 bits per channel are scaled to 8, what is transparent shows
    white, and of several frames or pages the first is taken, which the log says.
    ``image_size`` is the length of the short side or an exact (height, width); without
    it the image keeps its size up to a short side of 518. The crop takes away at the right
    and at the bottom. Raises ``UnreadableFile`` if there is no complete image at ``path``
    or one of numbers without a known range (32 bits, floating), ``InvalidInput`` if it has
    more than ``max_pixels`` (100 million without it), which its header tells before anything
    is decoded, or if not one patch fits in or it is beyond reason.
    """
    image = fit(open_upright(path, max_pixels), patch_size, image_size, path)
    picture = np.array(image)
    return Photograph(normalise(torch.from_numpy(picture)[None])[0], picture)


def normalise(pictures: Tensor) -> Tensor:
    """Return uint8 ``(B, H, W, 3)`` as models want it: float32 ``(B, 3, H, W)``."""
    channels_first = pictures.permute(0, 3, 1, 2).contiguous()
    normalised: Tensor = transforms.normalize(channels_first.float().div(255), MEAN, DEVIATION)
    return normalised


def open_upright(
    path: Path, max_pixels: int | None = None, content: bytes | None = None
) -> Image.Image:
    """Read the image at ``path`` whole, upright and in RGB, as ``read_photograph`` does.

    ``content`` is the file itself, where it is not at ``path``, which then only names it.
    """
    with _reported(path, max_pixels), _opened(path, content) as image:
        if getattr(image, "is_animated", False):
            log.info("%s has several frames or pages: the first is taken", path)
            image.seek(0)
        return upright(image, path)


def upright(image: Image.Image, path: Path) -> Image.Image:
    """Return an open image, called ``path``, whole, upright and in RGB."""
    image.load()
    turned = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        turned = _in_eight_bits(turned, image, path)
    return _in_rgb(turned)


def stored_size(
    path: Path, max_pixels: int | None = None, content: bytes | None = None
) -> tuple[int, int]:
    """Return height and width of the image at ``path``, by its header, as it is stored.

    Where it lies on its side the two change places in what ``open_upright`` reads.
    """
    with _reported(path, max_pixels), _opened(path, content) as image:
        return image.height, image.width


def fit(image: Image.Image, patch_size: int, size: ImageSize, path: Path) -> Image.Image:
    """Resize ``image``, called ``path``, and crop it to whole patches."""
    resized = _resized((image.height, image.width), size)
    height, width = fitted_size((image.height, image.width), patch_size, size, path)
    # With one length torchvision would make its own of the other.
    image = transforms.resize(image, list(resized), InterpolationMode.BICUBIC)
    return image.crop((0, 0, width, height))


def fitted_size(
    size: tuple[int, int], patch_size: int, image_size: ImageSize, path: Path
) -> tuple[int, int]:
    """Return height and width of what ``fit`` makes of an image of ``size`` (height, width)."""
    height, width = (side - side % patch_size for side in _resized(size, image_size))
    if not (width and height):
        raise InvalidInput(
            f"an image of at least one patch, {patch_size} × {patch_size}",
            f"{path} of {size[0]} × {size[1]} (height × width)",
            "Enlarge it with --image-size.",
        )
    return height, width


@contextlib.contextmanager
def _reported(path: Path, max_pixels: int | None) -> Iterator[None]:
    """Let Pillow read at most ``max_pixels``, and raise errors of ours for its own."""
    most = max_pixels or MOST_PIXELS
    try:
        with _limit(most):
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput(
            f"an image of at most {most:,} pixels",
            f"{path} ({error})",
            "Shrink it, or allow it with --max-pixels N.",
        ) from error
    except UnreadableFile:
        raise
    except Exception as error:  # Pillow's readers raise whatever foreign bytes provoke
        raise UnreadableFile(
            "a complete image file",
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            "Check the path and that an image viewer opens it.",
        ) from error


def _opened(path: Path, content: bytes | None) -> Image.Image:
    image = Image.open(path if content is None else _Content(content, path))
    if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
        image.close()
        raise UnreadableFile(
            "an image of pixels", f"{path}, which is PostScript", "Convert it to PNG."
        )
    return image


class _Content(io.BytesIO):
    """The bytes of a file, called by its name in Pillow's errors, not by a place in memory."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(content)
        self._path = path

    def __repr__(self) -> str:
        return repr(str(self._path))


# Pillow's limit is one for the process.
_LIMIT = threading.Lock()


@contextlib.contextmanager
def _limit(pixels: int) -> Iterator[None]:
    """Let Pillow refuse images of more ``pixels``, and those inside of a file, by their headers."""
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        # As viewers show it: below there may be any colour, black as a rule.
        opaque = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("RGB")


_TRANSPARENT = {"LA", "PA", "RGBA", "RGBa"}

# Whose mode I is 16 bits deep, as Pillow's older versions open it.
_SIXTEEN_BITS = {"PNG", "PPM"}


def _in_eight_bits(turned: Image.Image, image: Image.Image, path: Path) -> Image.Image:
    """Scale 0…65535 to 0…255, where Pillow would clip to white."""
    if not (image.mode.startswith("I;16") or image.format in _SIXTEEN_BITS):
        raise UnreadableFile(
            "an image of 8 or 16 bits per channel",
            f"{path} of Pillow's mode {image.mode}, whose values have no known range",
            "Scale them to 0…255 and save it again.",
        )
    values = np.asarray(turned).astype(np.float32) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _resized(size: tuple[int, int], wanted: ImageSize) -> tuple[int, int]:
    """Return height and width, before they are cropped, of an image of ``size``."""
    if wanted is None:
        wanted = min(*size, LARGEST_SHORT_SIDE)
    if isinstance(wanted, int):
        # As torchvision does it, which rounds down.
        short, long = sorted(size)
        other = wanted * long // short
        wanted = (wanted, other) if size[0] <= size[1] else (other, wanted)
    pixels = wanted[0] * wanted[1]
    if pixels > MOST_PIXELS:
        raise InvalidInput(
            f"an image of at most {MOST_PIXELS:,} pixels after resizing",
            f"{pixels:,}",
            "Give a smaller --image-size.",
        )
    return wanted
