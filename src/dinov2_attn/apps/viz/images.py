"""``load_image``: an image as the input of a model, and the same crop as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dinov2_attn.apps.viz.decoding import decode, shown
from dinov2_attn.apps.viz.opening import MOST_PIXELS
from dinov2_attn.apps.viz.reading import IMAGENET, Numbers, Range, Reading, reading_for, warn
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.geometry import patches_of

# The published weights were trained up to this size. The cost of attention grows with the
# fourth power of an image's side.
LARGEST_SHORT_SIDE = 518

ImageSize = int | tuple[int, int] | None
# The side of a square patch in pixels, or its height and width.
PatchSize = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image cropped to whole patches: what the model sees, and what is shown.

    Attributes:
        tensor: The input of the model: float32 ``(C, H, W)``, normalised.
        picture: The same pixels to show: uint8 ``(H, W, 3)``. With fewer than 3 channels, the
            first one in grey; with more, the first three.
        reading: The channels, range, mean and deviation. ``None`` if it was not loaded from a
            file.
        ends: The values of the file that became 0 and 1 before normalisation.

    """

    tensor: Tensor
    picture: npt.NDArray[np.uint8]
    reading: Reading | None = None
    ends: tuple[float, float] | None = None

    def __repr__(self) -> str:
        channels, height, width = self.tensor.shape
        return f"LoadedImage(channels={channels}, height={height}, width={width})"

    def range_note(self) -> str:
        """Return a sentence about range and normalisation, empty if they are unknown."""
        if self.reading is None or self.ends is None:
            return ""
        low, high = self.ends
        return f"Image: {low:g} is black and {high:g} is white; {self.reading}."

    def metadata(self) -> dict[str, Any]:
        """Return how the image was read as plain JSON values, empty if that is unknown."""
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
    path: str | Path,
    model_or_patch_size: nn.Module | PatchSize | None = None,
    image_size: ImageSize = None,
    max_pixels: int | None = None,
    *,
    channels: int | None = None,
    range: Range = None,
    mean: Numbers = None,
    std: Numbers = None,
) -> LoadedImage:
    """Load an image, resize it, crop it to whole patches and normalise it.

    >>> image = viz.load_image("cat.jpg", model)
    >>> model.get_last_self_attention(image.tensor[None])
    >>> viz.load_image("cells.tif", 14, range=(0, 4095), mean=0.5, std=0.5)

    Pillow reads the file. HEIC and JPEG XL need their Pillow plug-in, DICOM pydicom. TIFF files
    with other than 1, 3 or 4 channels need tifffile. A ``.npy`` file may hold ``(H, W)`` or
    ``(H, W, C)``. EXIF orientation is applied. Transparent pixels become white, unless alpha is a
    channel of the model. Of several frames or pages the first one is used, with a message in the
    log. If a TIFF has as many grey pages as the model has channels, each page is a channel. Pixels
    are reduced to 8 bits. The crop removes pixels at the right and at the bottom.

    Args:
        path: The image file.
        model_or_patch_size: The DINOv2 model (or a module that contains one), which gives the
            patch size and the number of channels. Or the patch size in pixels: an int, or
            ``(height, width)``. Without it an error says which to pass.
        image_size: The length of the short side, or the exact ``(height, width)``. By default
            the image keeps its size up to a short side of 518.
        max_pixels: The largest image that is decoded; 100 million by default. The size is
            taken from the header.
        channels: The number of channels: 3 (RGB), 1 (grey), or that of the file. By default
            that of the model, or 3.
        range: ``(low, high)``, the values that become 0 and 1. ``"auto"`` takes the minimum and
            maximum of the image. By default the range of the file's format.
        mean: Subtracted from each channel after scaling to 0…1. One number, or one per
            channel. By default ImageNet's; for other than 3 channels their average, 0.449.
        std: The divisor of each channel, like ``mean``. By default ImageNet's; for other than
            3 channels their average, 0.226.

    Returns:
        The image with ``.tensor``, float32 ``(C, H, W)``, and ``.picture``, uint8 ``(H, W, 3)``.

    Raises:
        UnreadableFileError: if the file is no complete image, contains NaN, or has numbers
            without a known range (32 bits, signed, floating) and no ``range`` was given.
        InvalidInputError: if the image has too many pixels, other channels than the model, or
            is smaller than one patch.

    Warns:
        SuspiciousRangeWarning: if a 16-bit image uses only a small part of its range.

    """
    patch_size, own_channels = _geometry(model_or_patch_size)
    reading = reading_for(own_channels if channels is None else channels, range, mean, std)
    decoded = decode(Path(path), reading, max_pixels)
    warn(decoded.doubt)
    pixels = fit(decoded.pixels, patch_size, image_size, Path(path))
    tensor = normalise(torch.from_numpy(pixels)[None], reading)[0]
    return LoadedImage(tensor, shown(pixels), reading, decoded.ends)


def load_on_grid(
    path: str | Path,
    model: nn.Module,
    other: nn.Module,
    image_size: ImageSize = None,
    max_pixels: int | None = None,
    *,
    range: Range = None,
    mean: Numbers = None,
    std: Numbers = None,
) -> LoadedImage:
    """Load what ``other`` sees of an image for ``model``, with the same grid of patches.

    If the patch sizes differ, the crop of ``other`` is resized. The other arguments are those of
    ``load_image``.
    """
    patch_size, channels = patches_of(model)
    others, _ = patches_of(other)
    reading = reading_for(channels, range, mean, std)
    decoded = decode(Path(path), reading, max_pixels)
    pixels = fit(decoded.pixels, others, image_size, Path(path))
    height, width = (
        side // old * new
        for side, old, new in zip(pixels.shape[:2], others, patch_size, strict=True)
    )
    pixels = fit(pixels, patch_size, (height, width), Path(path))
    tensor = normalise(torch.from_numpy(pixels)[None], reading)[0]
    return LoadedImage(tensor, shown(pixels), reading, decoded.ends)


def normalise(pictures: Tensor, reading: Reading = IMAGENET) -> Tensor:
    """Return uint8 ``(B, H, W, C)`` as the input of a model: float32 ``(B, C, H, W)``."""
    channels_first = pictures.permute(0, 3, 1, 2).contiguous()
    scaled = channels_first.float().div(255)
    normalised: Tensor = transforms.normalize(scaled, reading.mean, reading.std)
    return normalised


def fit(
    pixels: npt.NDArray[np.uint8], patch_size: PatchSize, size: ImageSize, path: Path
) -> npt.NDArray[np.uint8]:
    """Resize ``pixels`` ``(H, W, C)`` of the image ``path``, and crop them to whole patches."""
    stored = pixels.shape[0], pixels.shape[1]
    resized = _resized(stored, size)
    height, width = fitted_size(stored, patch_size, size, path)
    if resized != stored:
        # Given four channels, Pillow would weight the first three by the fourth.
        whole = pixels.shape[2] == 3
        planes = [pixels] if whole else [pixels[..., i] for i in range(pixels.shape[2])]
        done = [_resize(plane, resized) for plane in planes]
        pixels = done[0] if whole else np.stack(done, axis=-1)
    return np.array(pixels[:height, :width])


def fitted_size(
    size: tuple[int, int], patch_size: PatchSize, image_size: ImageSize, path: Path
) -> tuple[int, int]:
    """Return the height and width that ``fit`` gives an image of ``size`` (height, width)."""
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    resized = _resized(size, image_size)
    height, width = (side - side % step for side, step in zip(resized, patch, strict=True))
    if not (width and height):
        raise InvalidInputError(
            f"an image of at least one patch, {patch[0]} × {patch[1]}",
            f"{path} of {size[0]} × {size[1]} (height × width)",
            "Enlarge it with --image-size (in Python image_size=).",
        )
    return height, width


def _geometry(model_or_patch_size: Any) -> tuple[tuple[int, int], int]:
    """Return height and width of a patch, and the number of channels."""
    if isinstance(model_or_patch_size, nn.Module):
        return patches_of(model_or_patch_size)
    given = model_or_patch_size
    sides = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(sides) != 2 or not all(map(_is_size, sides)):
        raise InvalidInputError(
            "a model, or a patch size of one or two whole numbers above 0",
            "neither" if given is None else repr(given),
            "Pass the model, or its patch size: 14 for the published ones.",
        )
    return (int(sides[0]), int(sides[1])), 3


def _is_size(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) > 0


def _resize(plane: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    # torchvision would choose the second length itself if only one was given.
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.array(transforms.resize(image, list(size), InterpolationMode.BICUBIC))


def _resized(size: tuple[int, int], wanted: ImageSize) -> tuple[int, int]:
    """Return height and width after resizing, before the crop."""
    if wanted is None:
        wanted = min(*size, LARGEST_SHORT_SIDE)
    if isinstance(wanted, int):
        # torchvision rounds down too.
        short, long = sorted(size)
        other = wanted * long // short
        wanted = (wanted, other) if size[0] <= size[1] else (other, wanted)
    pixels = wanted[0] * wanted[1]
    if pixels > MOST_PIXELS:
        raise InvalidInputError(
            f"an image of at most {MOST_PIXELS:,} pixels after resizing",
            f"{pixels:,}",
            "Give a smaller --image-size (in Python image_size=).",
        )
    return wanted
