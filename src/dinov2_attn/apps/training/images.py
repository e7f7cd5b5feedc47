"""The images whose attention is drawn, as a model takes them and as they are shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dinov2_attn.apps.viz.decoding import shown
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.apps.viz.model_input import as_picture, image_for
from dinov2_attn.apps.viz.pixels import is_input
from dinov2_attn.errors import InvalidInputError


def loaded(images: Any, model: nn.Module) -> list[LoadedImage]:
    """Return each of ``images``: paths, images of Pillow, arrays, or inputs of ``model``.

    Raises:
        InvalidInputError: If there is none, or one is of another kind.
        UnreadableFileError: If a file is no image.

    """
    batch = isinstance(images, Tensor) and images.ndim == 4
    several = list(images) if batch or isinstance(images, list | tuple) else [images]
    if not several:
        raise InvalidInputError("at least one image", "none", "Pass the path of one.")
    return [_of_input(one) if _is_input(one) else image_for(model, one) for one in several]


def _is_input(image: Any) -> bool:
    return isinstance(image, Tensor) and image.is_floating_point() and is_input(image)


def _of_input(image: Tensor) -> LoadedImage:
    """Return the input of a model, which may be normalised in any way, with a picture of it."""
    tensor = (image[0] if image.ndim == 4 else image).detach().float().cpu()
    try:
        return LoadedImage(tensor, as_picture(tensor))
    except InvalidInputError:
        return LoadedImage(tensor, _stretched(tensor))


def _stretched(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return ``(C, H, W)`` as uint8 ``(H, W, 3)``, from its least to its greatest number."""
    low, high = tensor.min(), tensor.max()
    scaled = (tensor - low) / (high - low).clamp_min(torch.finfo(tensor.dtype).tiny) * 255
    pixels: npt.NDArray[np.uint8] = scaled.round().to(torch.uint8).movedim(0, -1).numpy()
    return shown(pixels)
