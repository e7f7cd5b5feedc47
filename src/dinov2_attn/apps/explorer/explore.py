"""``explore``: the attention of a model on an image, as an interactive page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_attn.apps.explorer.assemble import Tables
from dinov2_attn.apps.explorer.budget import NOTHING, KeptRows, Shape, everything
from dinov2_attn.apps.explorer.coded import CodedLayer
from dinov2_attn.apps.explorer.content import Frame, bytes_in
from dinov2_attn.apps.explorer.factors import queries_and_keys
from dinov2_attn.apps.explorer.fit import (
    COARSEST,
    Candidate,
    candidate,
    fit,
    reserved,
    size_of,
    smaller,
)
from dinov2_attn.apps.explorer.quantise import Table
from dinov2_attn.apps.explorer.write import (
    ExplorerPage,
    page_of,
    quantise_layer,
    room_for_layers,
    rows_to_keep,
)
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.apps.viz.inference import inference_on
from dinov2_attn.backbone.backbone import Backbone, grafted_backbone
from dinov2_attn.grafting.modules import runs_itself
from dinov2_attn.maps.find_artifacts import artifact_tokens
from dinov2_attn.maps.record import record
from dinov2_attn.typing import Heads, Layers


def explore(
    model: Any,
    image: LoadedImage,
    path: str | Path | None = None,
    layers: Layers = None,
    *,
    heads: Heads = None,
    title: str = "Attention",
    name: str = "",
    warning: str | None = None,
    max_mb: float = 25.0,
) -> ExplorerPage:
    """Show where every token of an image looks, in every layer and head, as an interactive page.

    >>> viz.explore(model, viz.load_image("cat.jpg", model), "cat.html")

    Queries and keys are stored in place of weights where they are smaller. The page then
    computes every weight of every layer. Otherwise, with ``heads="mean"``, and for layers that
    have no room, the page is the one that ``write_page`` makes of ``attention_maps``: rows that
    do not fit are left out. Outliers are marked.

    Args:
        model: A grafted vision transformer on any device.
        image: What ``load_image`` returned for this model.
        path: Where to write the HTML file. Without it nothing is written; the returned page
            shows itself in a notebook, and ``.save(path)`` writes it.
        layers: Which blocks, as in ``attention_maps``.
        heads: ``None`` for each head, ``"mean"`` for their mean.
        title: The title of the page.
        name: What the caption calls the model.
        warning: A line that stands out above everything else.
        max_mb: The maximum size of the page, in units of 1,000,000 bytes.

    Returns:
        The page, with its size and what it keeps and leaves out.

    Raises:
        InvalidInputError: if the model cannot be run on this image, or not one row fits.
        NotGraftedError: if ``install`` has not reached the model.
        UnwritableOutputError: if the file cannot be written.

    """
    backbone = grafted_backbone(model)
    device = next(model.parameters()).device
    images = image.tensor[None]
    wanted = backbone.layers(layers)
    shape = _shape(backbone, images, heads)
    with inference_on(images):
        images = images.to(device)
        outliers = artifact_tokens(model, images)
        limit = bytes_in(max_mb)
        frame = Frame(
            *(image.picture, shape, title, name, warning, outliers, 0, limit),
            range_note=image.range_note(),
        )
        coded, whole = _coded(model, images, frame, wanted, heads)
        kept = _rows_beside(coded, frame, wanted)
        tables: dict[int, Tables] = dict(_tables(model, images, shape, heads, kept))
    kept.update(dict.fromkeys(coded, everything(shape)))
    tables.update({layer: {"coded": one} for layer, one in coded.items()})
    page = page_of(frame, kept, dict(sorted(tables.items())), whole)
    if path is not None:
        page.save(path)
    return page


def _shape(backbone: Backbone, images: Tensor, heads: Heads) -> Shape:
    prefix, (height, width) = backbone.prefix, backbone.grid(images)
    queries = tuple(range(prefix + height * width))
    return Shape(0 if heads else backbone.model.num_heads, queries, prefix, (height, width))


def _coded(
    model: Any, images: Tensor, frame: Frame, layers: list[int], heads: Heads
) -> tuple[dict[int, CodedLayer], dict[int, int]]:
    """Return the layers that are kept as queries and keys, and what each layer takes as such."""
    if heads is not None or not layers:
        return {}, {}
    found = _candidates(model, images, layers)
    if not found or not smaller(found, frame.shape):
        return {}, {}
    whole = {layer: int(one.at(COARSEST)) for layer, one in found.items()}
    room = room_for_layers(frame, layers)
    for share in (0.98, 0.9, 0.75, 0.5):  # estimates may be too low, of small layers above all
        chosen = fit(found, frame.shape, int(share * room))
        if chosen is None:
            break
        numbers, coarseness = chosen
        coded = {layer: found[layer].encode(coarseness) for layer in numbers}
        if (
            sum(map(size_of, coded.values())) + reserved(len(layers) - len(coded), frame.shape)
            <= room
        ):
            return coded, whole
    return {}, whole


def _candidates(model: Any, images: Tensor, layers: list[int]) -> dict[int, Candidate]:
    backbone = Backbone(model)
    modules = (module for block in backbone.blocks for module in block.modules())
    # Where a key may be hidden, weights are not the softmax of products alone. Blocks that cannot
    # be run from outside give weights.
    if runs_itself(model) or any(getattr(module, "is_causal", False) for module in modules):
        return {}
    return {one.layer: candidate(one) for one in queries_and_keys(backbone, images, layers)}


def _rows_beside(
    coded: Mapping[int, CodedLayer], frame: Frame, layers: list[int]
) -> dict[int, KeptRows]:
    """Choose the rows of the layers that are not ``coded``."""
    rest = [layer for layer in layers if layer not in coded]
    taken = sum(map(size_of, coded.values()))
    return rows_to_keep(frame, rest, layers, taken) if rest or not coded else {}


def _tables(
    model: Any, images: Tensor, shape: Shape, heads: Heads, kept: dict[int, KeptRows]
) -> dict[int, dict[str, Table]]:
    tables: dict[int, dict[str, Table]] = {}

    def reduce(queries: tuple[int, ...]) -> Callable[[int, Tensor], None]:
        def put(layer: int, weights: Tensor) -> None:
            tables[layer] = quantise_layer(weights[0], queries, kept[layer])

        return put

    # If a layer keeps only the first rows, no others are computed.
    few = tuple(range(shape.prefix))
    used = {layer: rows.queries for layer, rows in kept.items() if rows != NOTHING}
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
