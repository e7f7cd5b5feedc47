"""An image in any of the forms that users have, as the input of a model and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2_attn.apps.viz.images import LoadedImage, fit, load_image, normalise
from dinov2_attn.apps.viz.pixels import as_pixels, is_input
from dinov2_attn.maps.geometry import patches_of


def image_for(model: nn.Module, image: Any) -> LoadedImage:
    """Return ``image`` as ``model`` sees it and as it is shown.

    Args:
        model: The model, which gives the size of a patch.
        image: What ``load_image`` returned, the path of a file, the input of the model itself
            ``(C, H, W)`` or ``(1, C, H, W)``, an image of Pillow, or an array with the channels
            last. The last two are resized, cropped and normalised as by ``load_image``.

    Raises:
        InvalidInputError: if it is none of these.
        UnreadableFileError: if the file is no image.

    """
    if isinstance(image, LoadedImage):
        return image
    if isinstance(image, str | Path):
        return load_image(image, model)
    if is_input(image):
        tensor: Tensor = image[0] if image.ndim == 4 else image
        return LoadedImage(tensor.detach().float(), as_picture(image))
    patch_size, _ = patches_of(model)
    picture = fit(as_picture(image), patch_size, None, Path("the image"))
    return LoadedImage(normalise(torch.from_numpy(picture)[None])[0], picture)


def as_picture(image: Any) -> npt.NDArray[np.uint8]:
    """Return an image in any form that ``as_pixels`` takes as uint8 ``(H, W, 3)``.

    What is transparent becomes white.
    """
    pixels = as_pixels(image)
    if pixels.dtype.kind == "f":
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.shape[2] == 4:
        whole = Image.fromarray(pixels)
        white = Image.new("RGBA", whole.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, whole).convert("RGB"))
    return np.ascontiguousarray(pixels)
