"""``attention_maps``: the attention of a model on images, with its patch grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor

from dinov2_attn.backbone.contract import name_of
from dinov2_attn.backbone.structure import count_registers
from dinov2_attn.backbone.validation import count_tokens, layers_to_take, patch_size
from dinov2_attn.errors import NotGrafted
from dinov2_attn.grafting.models import flat_blocks
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.math.selection import positions, spell_out
from dinov2_attn.typing import Grid, Heads, Images, Layers, Masks, Model, Queries


@overload
def attention_maps(
    model: Model,
    images: Tensor,
    n: Layers = None,
    masks: Tensor | None = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps: ...
@overload
def attention_maps(
    model: Model,
    images: Sequence[Tensor],
    n: Layers = None,
    masks: Sequence[Tensor | None] | None = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps[list[Tensor]]: ...


def attention_maps(
    model: Any,
    images: Images,
    n: Layers = None,
    masks: Masks = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps[Any]:
    """Return the attention of ``model`` on ``images``, with grid and prefix.

    >>> maps = attention_maps(model, images, n=1, queries="cls")
    >>> maps.maps()[0]         # (B, heads, 1, h, w)
    >>> maps.prefix_mass()[0]  # (B, heads, 1)

    Arguments, weights and errors are those of ``model.get_self_attention``: a list of
    batches gives lists. Gradients flow when grad is on. Raises ``NotGrafted`` where
    ``install`` has not reached the model; of a model that only contains a DINOv2, ``record``
    takes the attention.
    """
    check_grafted(model)
    weights = model.get_self_attention(images, n, masks, queries=queries, heads=heads)
    several = isinstance(images, list | tuple)
    batches: list[Any] = list(images) if several else [images]
    spelled = spell_out(queries, count_registers(model))
    grids = [grid_of(model, batch) for batch in batches]
    rows = [positions(spelled, count_tokens(model, batch)) for batch in batches]
    return AttentionMaps(
        weights=weights,
        layers=tuple(layers_to_take(n, len(flat_blocks(model.blocks)))),
        grid=list(grids) if several else grids[0],
        prefix=1 + count_registers(model),
        queries=rows if several else rows[0],
    )


def check_grafted(model: object) -> None:
    """Raise ``NotGrafted`` unless ``model`` answers for its attention."""
    if not hasattr(model, "get_self_attention"):
        raise NotGrafted(
            "a vision transformer that install() has reached",
            name_of(type(model)),
            "Call dinov2_attn.install(model) first, and pass the transformer itself.",
        )


def grid_of(model: Any, images: Tensor) -> Grid:
    """Return the patch grid ``(h, w)`` of a batch of images."""
    height, width = patch_size(model)
    return images.shape[-2] // height, images.shape[-1] // width
