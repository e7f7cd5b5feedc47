"""What a vision transformer of this family is: its blocks, tokens, patch grid, and its images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn._compat import submodules
from dinov2_attn._locks import cached_property
from dinov2_attn.backbone.structure import (
    Role,
    attention_modules,
    name_of,
    role_of_module,
    walk,
)
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.selection import layers_to_take, resolve_names, to_index
from dinov2_attn.typing import Grid, Layers, Queries

# The name under which a graft notes the keyword that it adds.
MARK = "_dinov2_attn_keyword"


class Backbone:
    """A vision transformer: its blocks, and how images become its tokens.

    Tokens are CLS, the registers, and the patches row by row: ``N = prefix + h · w``.

    Attributes:
        model: The vision transformer itself.
        blocks: Its blocks in the order in which they run, chunked or not.

    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = flat_blocks(model.blocks)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def registers(self) -> int:
        """The number of register tokens, which the first revisions of upstream do not have."""
        names = ("num_register_tokens", "n_storage_tokens")  # upstream's, DINOv3's
        return int(next((getattr(self.model, n) for n in names if hasattr(self.model, n)), 0))

    @property
    def prefix(self) -> int:
        """The number of tokens in front of the patches: CLS and the registers."""
        return 1 + self.registers

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        size = self.model.patch_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def channels(self) -> int:
        """The number of channels of its images."""
        return int(self.model.patch_embed.in_chans)

    @property
    def takes_lists(self) -> bool:
        """Whether its blocks run lists by themselves, each tensor with a kernel call of its own.

        DINOv3's do, and what a tensor becomes can depend on its place in the list.
        """
        is_one = hasattr(self.model, "forward_features_list")
        return is_one and all(hasattr(module, "forward_list") for module in self.attentions())

    @property
    def is_channel_adaptive(self) -> bool:
        """Whether it takes any number of channels, and runs each as an image of its own."""
        # Upstream's name for it. With three channels it could run nothing of the kind.
        return bool(getattr(self.model, "bag_of_channels", False)) and self.channels == 1

    def grid(self, images: Tensor) -> Grid:
        """Return the patch grid ``(h, w)`` of images ``(…, H, W)``."""
        height, width = self.patch_size
        return images.shape[-2] // height, images.shape[-1] // width

    def length(self, images: Tensor) -> int:
        """Return the number of tokens N of an image."""
        height, width = self.grid(images)
        return self.prefix + height * width

    def layers(self, chosen: Layers) -> list[int]:
        """Return the numbers of the blocks that ``chosen`` names, in ascending order."""
        return layers_to_take(chosen, self.depth)

    def resolve_names(self, queries: Queries) -> Queries:
        """Return ``queries`` with the words ``"registers"`` and ``"patches"`` as positions."""
        return resolve_names(queries, self.registers)

    def batches(self, images: Any, masks: Any, queries: Queries = None) -> list[tuple[Any, Any]]:
        """Return the images and the mask of each batch as the model runs them.

        A tensor is one batch, a list is several. A channel-adaptive model gets each channel as
        an image of its own, ``(B·C, 1, H, W)``, as from its ``get_intermediate_layers``: channel
        ``c`` of image ``b`` is number ``b * C + c``, and has the mask of its image.

        Raises:
            InvalidInputError: if the model cannot take them.
            OutOfRangeError: if there is no token for one of ``queries``.

        """
        several = isinstance(images, list | tuple)
        given = (
            zip(images, check_list(images, masks), strict=True) if several else [(images, masks)]
        )
        pairs = [self._batch(batch, mask) for batch, mask in given]
        for batch, _ in pairs:
            to_index(queries, self.length(batch))
        return pairs

    def tokens(self, images: Any, masks: Any = None) -> Any:
        """Return the tokens ``(B, N, C)`` that the first block is given."""
        return self.model.prepare_tokens_with_masks(images, masks)

    def walk(self, tokens: Any, stop: int | None = None) -> Iterator[tuple[int, nn.Module, Any]]:
        """Yield the number, the block and its input for the blocks before ``stop``.

        A block runs when the next one is asked for, and the last one does not run.
        """
        stop = self.depth if stop is None else stop
        for i, block in enumerate(self.blocks[:stop]):
            yield i, block, tokens
            if i + 1 < stop:
                tokens = block(tokens)

    def attentions(self) -> dict[nn.Module, int]:
        """Return the attention modules of all blocks, with the numbers of their blocks.

        One that stands in several blocks has the number of the last of them.
        """
        return dict(self._attentions)

    @property
    def shares_attention(self) -> bool:
        """Whether an attention module stands in several blocks."""
        return len(dict(self._attentions)) < len(self._attentions)

    @cached_property
    def _attentions(self) -> list[tuple[nn.Module, int]]:
        return [
            (module, layer)
            for layer, block in enumerate(self.blocks)
            for module in attention_modules(block).values()
        ]

    def _batch(self, images: Any, masks: Any) -> tuple[Any, Any]:
        groups = check_batch(self, images, masks)
        if groups == 1:
            return images, masks
        masks = None if masks is None else masks.repeat_interleave(groups, 0)
        return images.flatten(0, 1)[:, None], masks


def transformers_in(model: nn.Module) -> list[nn.Module]:
    """Return the vision transformers that ``model`` is or contains, wrapped or not."""
    return [module for _, module in walk(model) if _is_transformer(module)]


def backbone_in(model: object) -> Backbone:
    """Return the one vision transformer that ``model`` is or contains, wrapped or not.

    Raises:
        InvalidInputError: if there is none, or more than one.

    """
    found = transformers_in(model) if isinstance(model, nn.Module) else []
    if len(found) != 1:
        raise InvalidInputError(
            f"one DINOv2 inside {name_of(type(model))}",
            f"{len(found)}",
            "Pass the vision transformer itself.",
        )
    return Backbone(found[0])


def flat_blocks(blocks: Sequence[nn.Module] | nn.ModuleList) -> list[nn.Module]:
    """Return the blocks of a flat or a chunked model, in order.

    Chunks are lists of blocks, padded in front with ``nn.Identity`` so that indices stay
    those of the whole model.
    """
    flat: list[nn.Module] = []
    for block in blocks:
        chunk = _chunk_in(block)
        flat.extend([block] if chunk is None else flat_blocks(chunk))
    return [block for block in flat if not isinstance(block, nn.Identity)]


def accepts(module: nn.Module, keyword: str) -> bool:
    """Return whether a graft gave ``keyword`` to the class of ``module``."""
    return getattr(type(module).forward, MARK, None) == keyword


def _chunk_in(module: nn.Module) -> nn.ModuleList | None:
    """Return the chunk that ``module`` is, or wraps as its only child (checkpointed, compiled)."""
    while not isinstance(module, nn.ModuleList):
        children = list(module.children())
        if len(children) != 1:
            return None
        module = children[0]
    return module


# The first test is cheap, and false for almost every module.


def _is_transformer(module: nn.Module) -> bool:
    return "blocks" in submodules(module) and role_of_module(module) is Role.TRANSFORMER


def check_batch(model: Backbone, images: object, masks: object = None) -> int:
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


def checked_module(model: object) -> nn.Module:
    """Return ``model``, or raise ``InvalidInputError`` if it is no module."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            "a model: a torch.nn.Module", type(model).__name__, "Pass the module itself."
        )
    return model


def check_in_eval_mode(model: nn.Module) -> None:
    """Raise ``InvalidInputError`` if ``model`` is in training mode."""
    if model.training:
        raise InvalidInputError(
            "a model in eval mode", "one in training mode", "Call model.eval()."
        )


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
        scaled = scaled.replace("images", "images.permute(0, 3, 1, 2)")
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
