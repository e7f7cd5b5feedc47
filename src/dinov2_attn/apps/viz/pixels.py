"""Arrays that are given as images: checked, made grey, or dimmed outside of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.reading import DEVIATION, GREY_DEVIATION, GREY_MEAN, MEAN
from dinov2_attn.errors import InvalidInputError

# The brightness of red, green and blue (Rec. 709).
BRIGHTNESS = (0.2126, 0.7152, 0.0722)
# How bright a dimmed pixel stays.
DIM = 0.4
# How far past black and white a normalised image may be, which was resized or rounded.
ROUNDING = 0.05


def as_pixels(image: Any) -> npt.NDArray[Any]:
    """Return an image as matplotlib shows it: ``(H, W, 3)`` or ``(H, W, 4)``.

    Args:
        image: A ``LoadedImage``, an image of Pillow, or an array or tensor ``(H, W)``,
            ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)`` on any device: integers of 0…255, floats
            of 0…1 or booleans. Or the input tensor of a model, floats ``(C, H, W)`` or
            ``(1, C, H, W)`` with 1 or 3 channels. One with negative numbers was normalised: that is
            undone with the mean and deviation of ImageNet.

    Raises:
        InvalidInputError: for anything else. Floats may be of 0…255, of 12 bits or normalised,
            and nothing in the array says which.

    """
    image = getattr(image, "picture", image)
    if is_input(image):
        image = _without_normalisation(image.detach().cpu().float())
    pixels = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise InvalidInputError(
            "an image of shape (H, W, 3) or (H, W)",
            f"{type(image).__name__} of shape {np.shape(pixels)}",
            _to_shape(pixels),
        )
    _check_values(pixels, type(image).__name__)
    if pixels.dtype.kind in "iub":
        pixels = pixels.astype(np.uint8) * (255 if pixels.dtype.kind == "b" else 1)
    elif pixels.dtype.itemsize < 4:
        pixels = pixels.astype(np.float32)
    return pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels


def is_input(image: Any) -> bool:
    """Return whether ``image`` is the input tensor of a model: floats, with the channels first."""
    if not (hasattr(image, "detach") and image.is_floating_point()):
        return False
    if image.ndim == 4 and len(image) == 1:
        return True
    return image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3, 4)


def _without_normalisation(image: Any) -> Any:
    """Return the input tensor of a model with the channels last, in the range 0…1."""
    pixels = (image[0] if image.ndim == 4 else image).permute(1, 2, 0).numpy()
    if pixels.shape[2] not in (1, 3) or pixels.size == 0 or pixels.min() >= 0:
        return pixels
    count = pixels.shape[2]
    mean, std = (MEAN, DEVIATION) if count == 3 else (GREY_MEAN, GREY_DEVIATION)
    undone = pixels * np.asarray(std) + np.asarray(mean)
    # Roundings of black and white go a little past them.
    near = (undone > -ROUNDING) & (undone < 1 + ROUNDING)
    return np.clip(undone, 0, 1) if near.all() else pixels


def greyed(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return pixels ``(H, W, 3)`` or ``(H, W, 4)`` without colour, with their brightness."""
    grey = (pixels[..., :3] @ BRIGHTNESS)[..., np.newaxis]
    if pixels.dtype.kind in "iu":
        grey = grey.round()
    alike: npt.NDArray[Any] = np.concatenate([grey.repeat(3, axis=2), pixels[..., 3:]], axis=2)
    return alike.astype(pixels.dtype)


def dimmed(pixels: npt.NDArray[Any], kept: Mask) -> npt.NDArray[Any]:
    """Return pixels ``(H, W, 3)`` or ``(H, W, 4)``, grey and dark where not ``kept``.

    ``kept`` ``(h, w)`` marks patches. The image is divided into so many.
    """
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    dark = greyed(pixels)
    dark[..., :3] = (DIM * dark[..., :3]).astype(dark.dtype)
    shown: npt.NDArray[Any] = np.where(kept[rows][:, columns, np.newaxis], pixels, dark)
    return shown


def _check_values(pixels: npt.NDArray[Any], kind: str) -> None:
    if pixels.dtype.kind not in "biuf":
        raise InvalidInputError("an image of numbers", f"{pixels.dtype}", "Convert to uint8.")
    if not np.isfinite(pixels).all():
        raise InvalidInputError("an image of finite numbers", "NaN or infinity", "Replace them.")
    floating = pixels.dtype.kind == "f"
    least, greatest = pixels.min(), pixels.max()
    if least >= 0 and greatest <= (1 if floating else 255):
        return
    raise InvalidInputError(
        f"an image of {'floats of 0…1' if floating else 'integers of 0…255'}",
        f"{kind} of {pixels.dtype}, whose values run from {least:g} to {greatest:g}",
        _to_range(float(least), float(greatest), floating),
    )


def _to_range(least: float, greatest: float, floating: bool) -> str:
    if least < 0 and floating:
        return (
            "If it was normalised for the model, undo that: image * std + mean; or pass "
            "viz.load_image(...).picture."
        )
    if least < 0:
        return "Scale it to 0…1 first: (image - image.min()) / (image.max() - image.min())."
    white = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if greatest < 2**bits), None)
    if white is None:
        return "Divide it by the value of white."
    return f"Divide it by the value of white: image / {white} if that is {white}."


def _to_shape(pixels: npt.NDArray[Any]) -> str:
    if pixels.ndim == 4 and len(pixels) == 1:
        return "Take one image of the batch: image[0], with its channels last."
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
        return (
            "Put the channels last: image.transpose(1, 2, 0) of an array, "
            "image.permute(1, 2, 0) of a tensor."
        )
    return "Put the channels last, or pass viz.load_image(...).picture."
