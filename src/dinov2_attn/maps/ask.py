"""``attention_maps``: the attention of a model on images, with its patch grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor

from dinov2_attn.backbone.backbone import grafted_backbone
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Heads, Images, Layers, Masks, Model, Queries


@overload
def attention_maps(
    model: Model,
    images: Tensor,
    layers: Layers = None,
    masks: Tensor | None = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps: ...
@overload
def attention_maps(
    model: Model,
    images: Sequence[Tensor],
    layers: Layers = None,
    masks: Sequence[Tensor | None] | None = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps[list[Tensor]]: ...


def attention_maps(
    model: Any,
    images: Images,
    layers: Layers = None,
    masks: Masks = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps[Any]:
    """Return the attention of ``model`` on ``images``, with grid and prefix.

    >>> maps = attention_maps(model, images, layers=1, queries="cls")
    >>> maps.patch_maps()[0]         # (B, heads, 1, h, w)
    >>> maps.prefix_mass()[0]  # (B, heads, 1)

    Arguments, weights and errors are those of ``model.get_self_attention``: a list of
    batches gives lists. Gradients flow when grad is on. Raises ``NotGraftedError`` where
    ``install`` has not reached the model; of a model that only contains a DINOv2, ``record``
    takes the attention.
    """
    backbone = grafted_backbone(model)
    weights = model.get_self_attention(images, layers, masks, queries=queries, heads=heads)
    several = isinstance(images, list | tuple)
    batches: list[Any] = list(images) if several else [images]
    spelled = backbone.resolve_names(queries)
    grids = [backbone.grid(batch) for batch in batches]
    rows = [positions(spelled, backbone.length(batch)) for batch in batches]
    return AttentionMaps(
        weights=weights,
        layers=tuple(backbone.layers(layers)),
        grid=list(grids) if several else grids[0],
        prefix=backbone.prefix,
        queries=rows if several else rows[0],
    )
