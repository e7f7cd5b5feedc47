"""Checking images, masks and layers before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import whole_number
from dinov2_attn.typing import Grid, Layers


class Shape(Protocol):
    """What images and masks are checked against."""

    @property
    def channels(self) -> int:
        """The number of channels."""

    @property
    def is_channel_adaptive(self) -> bool:
        """Whether any number of channels will do."""

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch."""

    def grid(self, images: Tensor) -> Grid:
        """Return the patch grid of ``images``."""


def check_batch(model: Shape, images: object, masks: object = None) -> int:
    """Return how many images the model runs for each of ``images``, if it can take them.

    Args:
        model: The backbone.
        images: Floating, ``(B, C, H, W)``, of whole patches.
        masks: Boolean, ``(B, h·w)``, true where a patch is replaced by the mask token, or None.

    Returns:
        The number of channels for a channel-adaptive model, otherwise 1.

    Raises:
        InvalidInputError: if they are anything else.

    """
    images = check_images(images, dimensions=(4,))
    groups = images.shape[1] if model.is_channel_adaptive else 1
    _check_channels(model.channels, images, groups)
    height, width = model.patch_size
    if images.shape[2] % height or images.shape[3] % width or 0 in images.shape[2:]:
        raise InvalidInputError(
            f"height and width to be multiples of the patch size {height} × {width}",
            f"{images.shape[2]} × {images.shape[3]}",
            "Crop or resize the images to whole patches.",
        )
    if masks is not None:
        _check_masks(masks, images.shape[0], math.prod(model.grid(images)))
    return groups


def check_images(images: object, dimensions: Sequence[int] = (4, 5)) -> Tensor:
    """Return ``images`` if they are a floating tensor ``(B, C, H, W)``, or of frames of these.

    Raises:
        InvalidInputError: if they are anything else.

    """
    if isinstance(images, Tensor) and images.ndim in dimensions and images.is_floating_point():
        return images
    raise InvalidInputError(
        "images as a floating tensor of shape (B, C, H, W), or a list of such tensors",
        _describe(images),
        _to_floating(images),
    )


def _check_channels(channels: int, images: Tensor, groups: int) -> None:
    if images.shape[1] != channels * groups or not groups:
        raise InvalidInputError(
            f"images with {channels} channel{'s' * (channels != 1)} in dimension 1, as the model "
            "takes",
            f"{images.shape[1]}: {_describe(images)}",
            _way_to_channels(channels, images),
        )


def _way_to_channels(channels: int, images: Tensor) -> str:
    if images.shape[3] == channels:
        return "Put the channels before height and width: images.movedim(-1, 1)."
    if images.shape[1] == 1:
        return f"Repeat the one channel: images.repeat(1, {channels}, 1, 1)."
    if channels == 1:
        return "Average the channels: images.mean(1, keepdim=True)."
    if channels == 3 and images.shape[1] == 4:
        return "Leave the fourth channel out: images[:, :3]."
    return (
        f"Build the model with in_chans={images.shape[1]}, or pass the channels it was built for."
    )


def _to_floating(images: object) -> str:
    """Return how to convert ``images`` to a floating batch with the values a model expects."""
    if not isinstance(images, Tensor):
        return "Convert with torch.as_tensor(...), scaled to 0…1 and normalised as in training."
    batch = "images[None]" if images.ndim == 3 else "images"
    if images.is_floating_point():
        return f"Give {batch}." if images.ndim == 3 else "Reshape them to (B, C, H, W)."
    greatest = _GREATEST.get(str(images.dtype).removeprefix("torch."), 255)
    scaled = f"{batch}.float()" + (f" / {greatest}" if greatest > 1 else "")
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[-1] == 3:
        scaled = scaled.replace("images", "images.permute(0, 3, 1, 2)", 1)
    return (
        f"Scale to 0…1, then normalise as in training, for Meta's models with "
        f"torchvision.transforms.functional.normalize({scaled}, (0.485, 0.456, 0.406), "
        "(0.229, 0.224, 0.225))."
    )


# The value of white by dtype. Other integers are taken as 8-bit values.
_GREATEST = {"bool": 1, "uint16": 65535}


def check_list(images: Sequence[object], masks: object) -> list[Any]:
    """Return one mask (or ``None``) for each tensor of a list of batches."""
    if not images:
        raise InvalidInputError(
            "a list of at least one tensor", "an empty list", "Skip the call, or pass images."
        )
    if masks is None:
        return [None] * len(images)
    if not isinstance(masks, list | tuple) or len(masks) != len(images):
        raise InvalidInputError(
            f"a list of {len(images)} masks, one for each tensor in the list of images",
            f"a list of {len(masks)}" if isinstance(masks, list | tuple) else _describe(masks),
            "Pass None in the list where a tensor has no mask.",
        )
    return list(masks)


def layers_to_take(n: Layers, depth: int) -> list[int]:
    """Return the numbers of the blocks that ``n`` selects, in ascending order.

    As in upstream's ``get_intermediate_layers``: an int selects the last ``n``, a sequence selects
    those in it, ``None`` selects all. Negative numbers count from the end.
    """
    if n is None:
        return list(range(depth))
    if hasattr(n, "tolist"):  # a tensor or an array
        n = n.tolist()
    if not isinstance(n, Sequence):
        n = whole_number(n, "n, the blocks to take,")
        if not 0 <= n <= depth:
            raise OutOfRangeError(
                f"n, the number of last blocks to take, between 0 and {depth}",
                str(n),
                f"Pass a sequence to choose single blocks: [{depth - 1}] is the last.",
            )
        return list(range(depth - n, depth))
    layers = [whole_number(i, "blocks") for i in n]
    if wrong := [i for i in layers if not -depth <= i < depth]:
        raise OutOfRangeError(
            f"blocks between {-depth} and {depth - 1}, there being {depth}",
            ", ".join(map(str, wrong)),
            "Blocks count from 0.",
        )
    return sorted({i % depth for i in layers})


def _check_masks(masks: object, batch: int, patches: int) -> None:
    if (
        not isinstance(masks, Tensor)
        or masks.dtype != torch.bool
        or tuple(masks.shape) != (batch, patches)
    ):
        raise InvalidInputError(
            f"masks as a boolean tensor of shape ({batch}, {patches}): one entry for each patch",
            _describe(masks),
            "Flatten the mask grid row by row, and convert with masks.bool().",
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}"
