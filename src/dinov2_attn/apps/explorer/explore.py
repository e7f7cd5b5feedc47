"""``explore``: the attention of a model on a photograph, as an interactive page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_attn.apps.explorer.budget import NOTHING, KeptRows, Shape
from dinov2_attn.apps.explorer.content import Frame, bytes_in
from dinov2_attn.apps.explorer.quantise import Table
from dinov2_attn.apps.explorer.write import Written, keep, quantise_layer, write
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.apps.viz.inference import inference_on
from dinov2_attn.backbone.backbone import Backbone, grafted_backbone
from dinov2_attn.maps.artifacts import artifact_tokens
from dinov2_attn.maps.record import record
from dinov2_attn.typing import Heads, Layers


def explore(
    path: str | Path,
    model: Any,
    photograph: LoadedImage,
    layers: Layers = None,
    *,
    heads: Heads = None,
    title: str = "Attention",
    name: str = "",
    warning: str | None = None,
    max_mb: float = 25.0,
) -> Written:
    """Write the interactive page of ``model`` on ``photograph`` to ``path``.

    As ``write_page`` of ``attention_maps``, in the memory of one layer: each is quantised in
    the pass itself, and rows that the page has no room for are not computed. ``model`` is a
    grafted vision transformer on any device; ``layers`` and ``heads`` are as in
    ``get_self_attention``, ``name`` is what the caption calls the model. Outliers are marked.

    Raises ``InvalidInputError`` where the model cannot be run on this image here, and the errors of
    ``write_page`` and ``attention_maps``.
    """
    backbone = grafted_backbone(model)
    device = next(model.parameters()).device
    images = photograph.tensor[None]
    wanted = backbone.layers(layers)
    shape = _shape(backbone, images, heads)
    with inference_on(images):
        images = images.to(device)
        outliers = artifact_tokens(model, images)
        limit = bytes_in(max_mb)
        frame = Frame(
            *(photograph.picture, shape, title, name, warning, outliers, 0, limit),
            read=photograph.told(),
        )
        kept = keep(frame, wanted)
        tables = _tables(model, images, shape, heads, kept)
    return write(Path(path), frame, kept, tables)


def _shape(backbone: Backbone, images: Tensor, heads: Heads) -> Shape:
    prefix, (height, width) = backbone.prefix, backbone.grid(images)
    queries = tuple(range(prefix + height * width))
    return Shape(0 if heads else backbone.model.num_heads, queries, prefix, (height, width))


def _tables(
    model: Any, images: Tensor, shape: Shape, heads: Heads, kept: dict[int, KeptRows]
) -> dict[int, dict[str, Table]]:
    tables: dict[int, dict[str, Table]] = {}

    def reduce(queries: tuple[int, ...]) -> Callable[[int, Tensor], None]:
        def put(layer: int, weights: Tensor) -> None:
            tables[layer] = quantise_layer(weights[0], queries, kept[layer])

        return put

    # Of a layer with few rows no others are computed.
    few = tuple(range(shape.prefix))
    used = {layer: keep.queries for layer, keep in kept.items() if keep != NOTHING}
    groups = {
        few: [layer for layer, queries in used.items() if queries <= set(few)],
        shape.queries: [layer for layer, queries in used.items() if not queries <= set(few)],
    }
    with ExitStack() as recordings:
        for queries, layers in groups.items():
            if layers:
                recorded = record(
                    model, layers, queries=queries, heads=heads, reduce=reduce(queries)
                )
                recordings.enter_context(recorded)
        model(images)
    return tables
