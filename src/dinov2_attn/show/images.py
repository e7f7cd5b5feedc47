"""Reading a photograph as a model wants it and as it is shown: the same crop, twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dinov2_attn.errors import InvalidInput, UnreadableFile

# The mean and deviation of ImageNet's channels, with which every DINOv2 was trained.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

# An image of so many pixels takes 1.2 GB as a tensor; its attention would take petabytes.
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


def read_photograph(path: Path, patch_size: int, image_size: ImageSize = None) -> Photograph:
    """Read the image at ``path``, upright and in RGB, resize it, crop it to whole patches.

    ``image_size`` is the length of the short side or an exact (height, width); without
    it the image keeps its size up to a short side of 518. The crop takes away at the right
    and at the bottom. Raises ``UnreadableFile`` if there is no complete image of 8 bits per
    channel at ``path``, ``InvalidInput`` if not one patch fits in or it is beyond reason.
    """
    image = _resize(_open(path), image_size)
    width, height = (side - side % patch_size for side in image.size)
    if not (width and height):
        raise InvalidInput(
            f"an image of at least one patch, {patch_size} × {patch_size}",
            f"{path} of {image.height} × {image.width} (height × width)",
            "Enlarge it with --image-size.",
        )
    image = image.crop((0, 0, width, height))
    tensor = transforms.normalize(transforms.to_tensor(image), MEAN, DEVIATION)
    return Photograph(tensor, np.array(image))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's readers raise whatever foreign bytes provoke
        raise UnreadableFile(
            "a complete image file",
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            "Check the path and that an image viewer opens it.",
        ) from error
    # Pillow would clip deeper channels to white instead of scaling them.
    if upright.mode.startswith(("I", "F")):
        raise UnreadableFile(
            "an image of 8 bits per channel",
            f"{path} of Pillow's mode {upright.mode}",
            "Scale its values to 0…255 and save it again.",
        )
    return upright.convert("RGB")


def _resize(image: Image.Image, size: ImageSize) -> Image.Image:
    if size is None:
        size = min(*image.size, LARGEST_SHORT_SIDE)
    if isinstance(size, int):
        short, long = sorted(image.size)
        lengths, pixels = [size], size * size * long // short
    else:
        lengths, pixels = list(size), size[0] * size[1]
    if pixels > MOST_PIXELS:
        raise InvalidInput(
            f"an image of at most {MOST_PIXELS:,} pixels after resizing",
            f"{pixels:,}",
            "Give a smaller --image-size.",
        )
    # One length is the short side to torchvision, two are height and width.
    resized: Image.Image = transforms.resize(image, lengths, InterpolationMode.BICUBIC)
    return resized
