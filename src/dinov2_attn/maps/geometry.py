"""What is needed of a model before its first image: patch size, channels, tokens, layers, heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dinov2_attn.backbone.backbone import Backbone, transformers_in
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.structure import cuts_patches, image_entrances, name_of
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.interventions import added_tokens
from dinov2_attn.grafting.tokens import Tokens
from dinov2_attn.kernels.capture import heads_of
from dinov2_attn.maps.layers import recorded_in
from dinov2_attn.typing import Grid

# The side of the image of a probe in patches, where the model names no size of its own.
_SIDE = 8


@dataclass(frozen=True)
class Geometry:
    """What a model takes, and what its weights look like.

    Attributes:
        patch_size: Height and width of a patch, in pixels.
        channels: The number of channels of its images.
        prefix: The number of tokens before the patches.
        depth: The number of layers.
        heads: The number of heads of a layer.
        width: The number of channels of a query, a key or a value, all heads together.

    """

    patch_size: Grid
    channels: int
    prefix: int
    depth: int
    heads: int
    width: int

    @property
    def registers(self) -> int:
        """The number of tokens between CLS and the patches."""
        return max(0, self.prefix - 1)

    def grid(self, height: int, width: int) -> Grid:
        """Return the patch grid of images of that size."""
        return height // self.patch_size[0], width // self.patch_size[1]


_KNOWN: WeakKeyDictionary[nn.Module, Geometry] = WeakKeyDictionary()


def geometry_of(model: Any) -> Geometry:
    """Return the geometry of ``model``. Where it has no blocks of upstream's, it is probed once.

    Raises:
        InvalidInputError: If patches or attention are not found, or a cell has several tokens.

    """
    if added_tokens():  # which end with their block
        return _measured(model)
    if model not in _KNOWN:
        _KNOWN[model] = _measured(model)
    return _KNOWN[model]


def patches_of(model: nn.Module) -> tuple[Grid, int]:
    """Return height and width of a patch of ``model``, and the number of channels.

    Raises:
        InvalidInputError: If no convolution cuts patches, or several of different size do.

    """
    if len(transformers_in(model)) == 1:
        backbone = Backbone(transformers_in(model)[0])
        return backbone.patch_size, backbone.channels
    found = {patch for module in image_entrances(model) for patch in _patches_cut_by(module)}
    if len(found) != 1:
        raise InvalidInputError(
            f"one convolution inside {name_of(type(model))} that cuts images into patches",
            f"{len(found)} sizes of patches" if found else "none",
            "Pass the vision transformer itself, or for a picture the size of a patch.",
        )
    return next(iter(found))


def _patches_cut_by(module: nn.Module) -> Iterator[tuple[Grid, int]]:
    for child in module.children():
        if isinstance(child, nn.Conv2d) and cuts_patches(child):
            height, width = child.kernel_size
            yield (height, width), child.in_channels


def _measured(model: nn.Module) -> Geometry:
    patch_size, channels = patches_of(model)
    modules = recorded_in(model, None)
    attention = next(iter(modules.wanted))
    heads = heads_of(attention) or 1
    width = _width_of(attention)
    depth = len(set(modules.wanted.values()))
    if modules.backbone is not None and modules.backbone.model is modules.whole:
        backbone = modules.backbone
        return Geometry(patch_size, channels, backbone.prefix, depth, heads, width)
    like = next(model.parameters())
    size = size_of_images(model, patch_size)
    images = torch.zeros(1, channels, *size, dtype=like.dtype, device=like.device)
    layout = Tokens(modules.whole, modules.backbone, attention, None, images).layout()
    _check_layout(model, layout)
    prefix = layout.prefix if layout else 0
    return Geometry(patch_size, channels, prefix, depth, heads, width)


def _width_of(attention: nn.Module) -> int:
    """Return the channels of the narrowest projection: of values, or that of the output."""
    linear = [one.out_features for one in attention.modules() if isinstance(one, nn.Linear)]
    return min(linear, default=1)


def size_of_images(model: Any, patch_size: Grid) -> Grid:
    """Return a size of images that ``model`` takes: timm's or transformers' own, or any."""
    config = getattr(model, "config", None)
    for given in (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(config, "image_size", None),
    ):
        size = (given, given) if isinstance(given, int) else given
        if isinstance(size, tuple | list) and len(size) == 2:
            height, width = map(int, size)
            if height % patch_size[0] == width % patch_size[1] == 0:
                return height, width
    return _SIDE * patch_size[0], _SIDE * patch_size[1]


def _check_layout(model: nn.Module, layout: Layout | None) -> None:
    if layout is not None and layout.per_cell == 1:
        return
    raise InvalidInputError(
        f"a model with one token for each patch: {name_of(type(model))}",
        "several for each" if layout else "no patches among its tokens",
        "Record its passes: with record(model) as maps: model(images).",
    )
