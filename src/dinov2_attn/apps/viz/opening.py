"""Open an image file: with Pillow, or with tifffile for TIFFs that Pillow cannot read."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dinov2_attn.apps.viz.formats import plugin_for, register_plugins
from dinov2_attn.errors import Dinov2AttnError, InvalidInputError, UnreadableFileError

# Such an image takes 0.3 GB decoded and 1.2 GB as a tensor. Its attention would take petabytes.
MOST_PIXELS = 100_000_000

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextlib.contextmanager
def reported(path: Path, max_pixels: int | None) -> Iterator[None]:
    """Limit Pillow to ``max_pixels``, and turn its errors into errors of the package."""
    most = max_pixels or MOST_PIXELS
    try:
        with _limit(most):
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, most, str(error)) from error
    except Dinov2AttnError:
        raise
    except Exception as error:  # Pillow's readers may raise anything
        raise UnreadableFileError(
            "a complete image file",
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            "Check the path and that an image viewer opens it.",
        ) from error


def opened(path: Path, content: bytes | None) -> Image.Image:
    """Open an image with Pillow or a plug-in. Raise ``UnreadableFileError`` if one is missing."""
    register_plugins()
    try:
        image = Image.open(path if content is None else _Content(content, path))
    except UnidentifiedImageError as error:
        if package := plugin_for(header(path, content)) or plugin_for(path):
            raise UnreadableFileError(
                "an image that Pillow can open",
                f"{path}, whose format needs a plug-in that is not installed",
                f"Install it with `pip install {package}`.",
            ) from error
        raise
    if image.format == "EPS":  # a program, which Pillow would run with Ghostscript
        image.close()
        raise UnreadableFileError(
            "an image of pixels", f"{path}, which is PostScript", "Convert it to PNG."
        )
    return image


def header(path: Path, content: bytes | None) -> bytes:
    """Return the first 32 bytes of a file."""
    if content is not None:
        return content[:32]
    with path.open("rb") as file:
        return file.read(32)


def is_array(path: Path, content: bytes | None) -> bool:
    """Return whether a file holds a NumPy array."""
    return header(path, content).startswith(b"\x93NUMPY")


def read_array(path: Path, content: bytes | None, max_pixels: int | None) -> npt.NDArray[Any]:
    """Return the array ``(H, W)`` or ``(H, W, C)`` of a .npy file, without unpickling."""
    if content is None:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif" or not array.size:
        raise UnreadableFileError(
            "an array of numbers of shape (H, W) or (H, W, C)",
            f"{path} of {array.dtype} {array.shape}",
            "Save one image with its channels last.",
        )
    check_pixels(path, array.shape[:2], max_pixels)
    return array


def check_pixels(path: Path, size: tuple[int, ...], max_pixels: int | None) -> None:
    """Raise ``InvalidInputError`` for an image of more than ``max_pixels``."""
    most = max_pixels or MOST_PIXELS
    if size[0] * size[1] > most:
        raise _too_large(path, most, f"{size[0]} × {size[1]}")


@contextlib.contextmanager
def tiff_page(path: Path, content: bytes | None) -> Iterator[Any]:
    """Open the first page of a TIFF with tifffile.

    Raises:
        UnreadableFileError: if tifffile is missing.

    """
    if importlib.util.find_spec("tifffile") is None:
        raise UnreadableFileError(
            "a complete image file, of a kind that Pillow reads",
            f"{path}, a TIFF that Pillow cannot read in full",
            "Check that an image viewer opens it. For TIFFs of several channels, of 16 bits in "
            "colour or of floats: `pip install tifffile`.",
        )
    import tifffile

    file = tifffile.TiffFile(path if content is None else io.BytesIO(content))
    with file:
        yield file.pages[0]


def read_tiff(path: Path, content: bytes | None, max_pixels: int | None) -> npt.NDArray[Any]:
    """Read the first page of a TIFF, ``(H, W)`` or ``(H, W, C)``, with tifffile."""
    with tiff_page(path, content) as page:
        check_pixels(path, (page.imagelength, page.imagewidth), max_pixels)
        values: npt.NDArray[Any] = page.asarray()
        # Some files store the channels first.
        return np.moveaxis(values, 0, -1) if page.axes.startswith("S") else values


def is_tiff(path: Path, content: bytes | None) -> bool:
    """Return whether a file starts like a TIFF."""
    return header(path, content).startswith(_TIFF)


def _too_large(path: Path, most: int, found: str) -> InvalidInputError:
    return InvalidInputError(
        f"an image of at most {most:,} pixels",
        f"{path} ({found})",
        "Shrink it, or allow it with --max-pixels N.",
    )


class _Content(io.BytesIO):
    """The bytes of a file. Pillow's errors show its name instead of an address in memory."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(content)
        self._path = path

    def __repr__(self) -> str:
        return repr(str(self._path))


# Pillow has one limit for the whole process.
_LIMIT = threading.Lock()


@contextlib.contextmanager
def _limit(pixels: int) -> Iterator[None]:
    """Make Pillow refuse images of more ``pixels`` by their headers."""
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
