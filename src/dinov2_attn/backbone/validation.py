"""Refusing what a model cannot take, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.backbone.structure import count_registers
from dinov2_attn.errors import InvalidInput, OutOfRange
from dinov2_attn.math.selection import whole_number
from dinov2_attn.typing import Layers


def take_batch(model: Any, images: Any, masks: Any = None) -> tuple[Tensor, Tensor | None]:
    """Return ``images`` and ``masks`` as ``model`` runs them, if they are one batch it can take.

    Images are ``(B, C, H, W)``, floating, with whole patches; masks ``(B, h·w)``,
    boolean, true where a patch is replaced by the mask token, or ``None``. A
    channel-adaptive model gets each channel as an image of its own, ``(B·C, 1, H, W)``, as
    from its ``get_intermediate_layers``: channel ``c`` of image ``b`` is number
    ``b * C + c``, and is masked like its image. Raises ``InvalidInput`` for anything else.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InvalidInput(
            "images as a floating tensor of shape (B, C, H, W), or a list of such tensors",
            _describe(images),
            _to_floating(images),
        )
    channels = images.shape[1] if is_channel_adaptive(model) else 1
    _check_size(model, images, channels)
    if masks is not None:
        _check_masks(masks, images.shape[0], _count_patches(model, images))
        masks = masks.repeat_interleave(channels, 0) if channels > 1 else masks
    return images.flatten(0, 1)[:, None] if channels > 1 else images, masks


def is_channel_adaptive(model: Any) -> bool:
    """Return whether ``model`` takes any number of channels, and runs each by itself."""
    # Upstream's name for it. With three channels it could run nothing of the kind.
    return bool(getattr(model, "bag_of_channels", False)) and model.patch_embed.in_chans == 1


def _check_size(model: Any, images: Tensor, groups: int) -> None:
    channels = input_channels(model)
    if images.shape[1] != channels * groups or not groups:
        raise InvalidInput(
            f"images with {channels} channel{'s' * (channels != 1)} in dimension 1, as the model "
            "takes",
            f"{images.shape[1]}: {_describe(images)}",
            _way_to_channels(channels, images),
        )
    height, width = patch_size(model)
    if images.shape[2] % height or images.shape[3] % width or 0 in images.shape[2:]:
        raise InvalidInput(
            f"height and width to be multiples of the patch size {height} × {width}",
            f"{images.shape[2]} × {images.shape[3]}",
            "Crop or resize the images to whole patches.",
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


def input_channels(model: Any) -> int:
    """Return how many channels the images of ``model`` have to have."""
    return int(model.patch_embed.in_chans)


def _to_floating(images: object) -> str:
    """Say how to make what is no floating batch one, with the values that a model expects."""
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


# What white is, by dtype; other integers are taken for values of 8 bits.
_GREATEST = {"bool": 1, "uint16": 65535}


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
                f"Pass a sequence to choose single blocks: n=[{depth - 1}] is the last.",
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
    """Return N = 1 + R + h·w for a batch of images that ``take_batch`` has passed."""
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
