"""Refusing what a model cannot take, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInput, OutOfRange
from dinov2_attn.queries import whole_number
from dinov2_attn.typing import Layers
from dinov2_attn.upstream.anatomy import count_registers


def check_images(model: Any, images: object, masks: object = None) -> None:
    """Raise ``InvalidInput`` unless ``images`` and ``masks`` are one batch ``model`` can take.

    Images are ``(B, C, H, W)``, floating, with whole patches; masks ``(B, h·w)``,
    boolean, true where a patch is replaced by the mask token, or ``None``.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InvalidInput(
            "images as a floating tensor of shape (B, C, H, W), or a list of such tensors",
            _describe(images),
            "Add the batch dimension with images[None], or convert with images.float().",
        )
    channels = int(model.patch_embed.in_chans)
    if images.shape[1] != channels:
        raise InvalidInput(
            f"images with {channels} channels in dimension 1",
            _describe(images),
            "Convert to RGB and put the channels before height and width.",
        )
    height, width = patch_size(model)
    if images.shape[2] % height or images.shape[3] % width or 0 in images.shape[2:]:
        raise InvalidInput(
            f"height and width to be multiples of the patch size {height} × {width}",
            f"{images.shape[2]} × {images.shape[3]}",
            "Crop or resize the images to whole patches.",
        )
    if masks is not None:
        _check_masks(masks, images.shape[0], _count_patches(model, images))


def check_list(images: Sequence[object], masks: object) -> list[Any]:
    """Return one mask (or ``None``) for each tensor of a list of batches."""
    if not images:
        raise InvalidInput(
            "a list of at least one tensor", "an empty list", "Skip the call, or pass images."
        )
    if masks is None:
        return [None] * len(images)
    if not isinstance(masks, list | tuple) or len(masks) != len(images):
        raise InvalidInput(
            f"a list of {len(images)} masks, one for each tensor in the list of images",
            f"a list of {len(masks)}" if isinstance(masks, list | tuple) else _describe(masks),
            "Pass None in the list where a tensor has no mask.",
        )
    return list(masks)


def layers_to_take(n: Layers, depth: int) -> list[int]:
    """Return the blocks meant by ``n``, in the order in which they run.

    As in upstream's ``get_intermediate_layers``: an int takes the last ``n``, a sequence
    takes those (negative ones counted from the end), ``None`` takes all.
    """
    if n is None:
        return list(range(depth))
    if hasattr(n, "tolist"):  # a tensor or an array
        n = n.tolist()
    if not isinstance(n, Sequence):
        n = whole_number(n, "n, the blocks to take,")
        if not 0 <= n <= depth:
            raise OutOfRange(
                f"n, the number of last blocks to take, between 0 and {depth}",
                str(n),
                "Pass a sequence, n=[3], to choose single blocks.",
            )
        return list(range(depth - n, depth))
    layers = [whole_number(i, "blocks") for i in n]
    if wrong := [i for i in layers if not -depth <= i < depth]:
        raise OutOfRange(
            f"blocks between {-depth} and {depth - 1}, there being {depth}",
            ", ".join(map(str, wrong)),
            "Blocks count from 0.",
        )
    return sorted({i % depth for i in layers})


def count_tokens(model: Any, images: Tensor) -> int:
    """Return N = 1 + R + h·w for a batch of images that ``check_images`` has passed."""
    return 1 + count_registers(model) + _count_patches(model, images)


def _count_patches(model: Any, images: Tensor) -> int:
    height, width = patch_size(model)
    return images.shape[2] // height * (images.shape[3] // width)


def patch_size(model: Any) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    size = model.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check_masks(masks: object, batch: int, patches: int) -> None:
    if (
        not isinstance(masks, Tensor)
        or masks.dtype != torch.bool
        or tuple(masks.shape) != (batch, patches)
    ):
        raise InvalidInput(
            f"masks as a boolean tensor of shape ({batch}, {patches}): one entry for each patch",
            _describe(masks),
            "Flatten the mask grid row by row, and convert with masks.bool().",
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}"
