"""Reading a photograph as a model wants it and as it is shown: the same crop, twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dinov2_attn.apps.viz.decoding import decode, shown
from dinov2_attn.apps.viz.opening import MOST_PIXELS
from dinov2_attn.apps.viz.ranges import warn
from dinov2_attn.apps.viz.reading import IMAGENET, Reading, reading_for
from dinov2_attn.errors import InvalidInputError

# The published weights were trained up to here; the cost of attention grows with the
# fourth power of an image's side.
LARGEST_SHORT_SIDE = 518

ImageSize = int | tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image cropped to whole patches.

    =======  ===================================================================
    tensor   float32 ``(C, H, W)``, normalised
    picture  uint8 ``(H, W, 3)``, as shown: other than 3 channels by the first in grey, or by
             the first three
    reading  how it was read, if it was read from a file
    ends     the values of the file that became 0 and 1 before they were normalised
    =======  ===================================================================
    """

    tensor: Tensor
    picture: npt.NDArray[np.uint8]
    reading: Reading | None = None
    ends: tuple[float, float] | None = None

    def told(self) -> str:
        """Return how it was read as a sentence; empty if not known."""
        if self.reading is None or self.ends is None:
            return ""
        low, high = self.ends
        return f"Image: {low:g} is black and {high:g} white; {self.reading}."

    def about(self) -> dict[str, Any]:
        """Return how it was read, for a file beside what is made of it; empty if not known."""
        if self.reading is None or self.ends is None:
            return {}
        return {
            "channels": self.reading.channels,
            "size": list(self.tensor.shape[1:]),
            "range": list(self.ends),
            "mean": list(self.reading.mean),
            "std": list(self.reading.std),
        }


def load_image(
    path: Path,
    patch_size: int,
    image_size: ImageSize = None,
    max_pixels: int | None = None,
    *,
    channels: int = 3,
    range: Any = None,
    mean: Any = None,
    std: Any = None,
) -> LoadedImage:
    """Read the image at ``path``, resize it, crop it to whole patches, normalise it.

    >>> load_image(path, 14, range=(0, 4095), mean=0.5, std=0.5).tensor

    ==========  ================================================================
    image_size  the length of the short side or an exact (height, width); without it the
                image keeps its size up to a short side of 518
    max_pixels  of an image, which its header tells before anything is decoded; 100 million
    channels    of the model: 3 (RGB), 1 (grey), or those of the file
    range       ``(low, high)``, the values that become 0 and 1, ``"auto"`` for the least and
                the greatest, or ``None`` for those of the file's format
    mean, std   one number or one for each channel, of values from 0 to 1; without them
                ImageNet's, or for other than 3 channels their averages, 0.449 and 0.226
    ==========  ================================================================

    It comes upright; what is transparent shows white, unless alpha is a channel of the model.
    Of several frames or pages the first is taken, which the log says, unless they are as many
    as the model has channels. 8 bits are kept. The crop takes away at the right and at the bottom.

    HEIC and JPEG XL need their plug-in for Pillow; TIFFs of other than 1, 3 or 4 channels need
    tifffile; arrays ``(H, W)`` or ``(H, W, C)`` may be saved as .npy. Warns with
    ``SuspiciousRangeWarning`` where 16 bits are not nearly used.

    Raises ``UnreadableFileError`` if there is no complete image at ``path``, or one of numbers
    without a known range (32 bits, signed, floating) and no ``range``, or NaN;
    ``InvalidInputError`` if it has too many pixels or other channels than the model, or if not one
    patch fits in.
    """
    reading = reading_for(channels, range, mean, std)
    decoded = decode(Path(path), reading, max_pixels)
    warn(decoded.doubt)
    pixels = fit(decoded.pixels, patch_size, image_size, path)
    tensor = normalise(torch.from_numpy(pixels)[None], reading)[0]
    return LoadedImage(tensor, shown(pixels), reading, decoded.ends)


def normalise(pictures: Tensor, reading: Reading = IMAGENET) -> Tensor:
    """Return uint8 ``(B, H, W, C)`` as models want it: float32 ``(B, C, H, W)``."""
    channels_first = pictures.permute(0, 3, 1, 2).contiguous()
    scaled = channels_first.float().div(255)
    normalised: Tensor = transforms.normalize(scaled, reading.mean, reading.std)
    return normalised


def fit(
    pixels: npt.NDArray[np.uint8], patch_size: int, size: ImageSize, path: Path
) -> npt.NDArray[np.uint8]:
    """Resize ``pixels`` (H, W, C) of the image ``path``, and crop them to whole patches."""
    stored = pixels.shape[0], pixels.shape[1]
    resized = _resized(stored, size)
    height, width = fitted_size(stored, patch_size, size, path)
    if resized != stored:
        # Pillow weighs the first three of four channels by the fourth, were it given all.
        whole = pixels.shape[2] == 3
        planes = [pixels] if whole else [pixels[..., i] for i in range(pixels.shape[2])]
        done = [_resize(plane, resized) for plane in planes]
        pixels = done[0] if whole else np.stack(done, axis=-1)
    return np.array(pixels[:height, :width])


def _resize(plane: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    # With one length torchvision would make its own of the other.
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.array(transforms.resize(image, list(size), InterpolationMode.BICUBIC))


def fitted_size(
    size: tuple[int, int], patch_size: int, image_size: ImageSize, path: Path
) -> tuple[int, int]:
    """Return height and width of what ``fit`` makes of an image of ``size`` (height, width)."""
    height, width = (side - side % patch_size for side in _resized(size, image_size))
    if not (width and height):
        raise InvalidInputError(
            f"an image of at least one patch, {patch_size} × {patch_size}",
            f"{path} of {size[0]} × {size[1]} (height × width)",
            "Enlarge it with --image-size.",
        )
    return height, width


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
        raise InvalidInputError(
            f"an image of at most {MOST_PIXELS:,} pixels after resizing",
            f"{pixels:,}",
            "Give a smaller --image-size.",
        )
    return wanted
