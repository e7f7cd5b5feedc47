"""``explore``: the attention of a model on an image, as an interactive page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov2_attn.apps.explorer.asked import Asked, asked_of, grafted_inside
from dinov2_attn.apps.explorer.assemble import Held, Tables
from dinov2_attn.apps.explorer.budget import NOTHING, KeptRows, cost, everything
from dinov2_attn.apps.explorer.coded import CodedLayer
from dinov2_attn.apps.explorer.content import Explained, Frame, bytes_in, explained
from dinov2_attn.apps.explorer.fit import (
    COARSEST,
    candidate,
    fit,
    reserved,
    size_of,
    smaller,
)
from dinov2_attn.apps.explorer.quantise import Table
from dinov2_attn.apps.explorer.write import (
    ExplorerPage,
    chosen,
    page_of,
    page_of_maps,
    page_of_two,
    quantise_layer,
    room_for_layers,
    rows_to_keep,
)
from dinov2_attn.apps.viz.images import load_on_grid
from dinov2_attn.apps.viz.inference import inference_on
from dinov2_attn.apps.viz.model_input import as_picture, image_for
from dinov2_attn.errors import IncompatibleUpstreamError, InvalidInputError
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.find_artifacts import artifact_tokens
from dinov2_attn.maps.relevance import Method, Relevance, relevance
from dinov2_attn.maps.targets import Target
from dinov2_attn.typing import Heads, RecordedLayers


def explore(
    maps_or_model: Any,
    image: Any,
    path: str | Path | None = None,
    layers: RecordedLayers = None,
    *,
    heads: Heads = None,
    title: str = "Attention",
    name: str = "",
    warning: str | None = None,
    max_mb: float = 25.0,
    sample: int = 0,
    artifacts: ArtifactTokens | None = None,
    other: nn.Module | None = None,
    other_image: Any = None,
    other_name: str = "",
    target: Target | Relevance | None = None,
    method: Method = "chefer",
) -> ExplorerPage:
    """Show where every token of an image looks, in every layer and head, as an interactive page.

    >>> viz.explore(model, "cat.jpg")                 # shown in a notebook
    >>> viz.explore(model, "cat.jpg", "cat.html")     # and written
    >>> viz.explore(maps, images[0]).save("cat.html")
    >>> viz.explore(model, "cat.jpg", other=trained)  # two models side by side

    Any model will do, as for ``attention_maps``. Its queries and keys are stored in place of
    weights where they are smaller and decide alone. The page then computes every weight of every
    layer. Otherwise, with ``heads="mean"``, of maps, and for layers that have no room, weights are
    stored, and rows that do not fit are left out. Outliers are marked.

    Args:
        maps_or_model: A model with attention inside, on any device. Or the ``AttentionMaps`` of a
            batch, or a ``Recording`` of one pass.
        image: What ``load_image`` returned, an image of Pillow, an array with the channels last,
            or the input tensor ``(C, H, W)``. For a model also the path of a file.
        path: Where to write the HTML file. Without it nothing is written; the returned page
            shows itself in a notebook, and ``.save(path)`` writes it.
        layers: Which layers, as in ``attention_maps``.
        heads: ``None`` for each head, ``"mean"`` for their mean.
        title: The title of the page.
        name: What the caption calls the model.
        warning: A line that stands out above everything else.
        max_mb: The maximum size of the page, in units of 1,000,000 bytes.
        sample: Which image of the batch of maps.
        artifacts: What ``artifact_tokens`` found in the batch of maps. A model is searched for
            them.
        other: A second model B, to compare with the first one, A: the page shows both on one
            scale, and the difference B − A. Both need the same grid of patches.
        other_image: The image for B, if it needs another size or normalisation. By default
            ``image``. A file is resized so that both have the same grid.
        other_name: What the page calls B.
        target: What the page shows the relevance for, as in ``relevance``; or what that function
            returned for the same image, or for the batch of maps.
        method: As in ``relevance``.

    Returns:
        The page, with its size and what it keeps and leaves out.

    Raises:
        InvalidInputError: if the model cannot be run on this image, its tokens or the maps cannot
            be shown, or not one row fits.
        UnwritableOutputError: if the file cannot be written.

    """
    about: Any = {"title": title, "warning": warning, "max_mb": max_mb}
    if other is not None:
        first, second = _model(maps_or_model), _model(other)
        if target is not None:
            raise _of_one_model(target)
        seen = _for_other(image, first, second) if other_image is None else other_image
        models = (first, image, name), (second, seen, other_name)
        page = _of_two(models, layers, heads, **about)
    elif isinstance(maps_or_model, nn.Module):
        wanted = (target, method)
        page = _of_model(maps_or_model, image, layers, heads, name=name, wanted=wanted, **about)
    else:
        maps = chosen(maps_or_model, layers, heads)
        about |= {"model": name, "outliers": artifacts, "sample": sample}
        page = page_of_maps(as_picture(image), maps, **about, found=_given(target))
    if path is not None:
        page.save(path)
    return page


def _model(given: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    raise InvalidInputError(
        "two models to compare on a page",
        type(given).__name__,
        "Pass both models. Of maps, draw a picture: viz.compare(a, b).",
    )


def _for_other(image: Any, first: nn.Module, second: nn.Module) -> Any:
    """Return the image of ``first`` for ``second``: a file is read again, on the same grid."""
    return load_on_grid(image, second, first) if isinstance(image, str | Path) else image


def _of_two(
    models: Sequence[tuple[nn.Module, Any, str]],
    layers: RecordedLayers,
    heads: Heads,
    *,
    title: str,
    warning: str | None,
    max_mb: float,
) -> ExplorerPage:
    """Return the page of two models, each with half of the room."""
    about: Any = {"title": title, "warning": warning, "max_mb": max_mb / 2}
    first, second = (
        _held(model, image, layers, heads, name=name, **about) for model, image, name in models
    )
    grids = [held.frame.shape.grid for held in (first, second)]
    if grids[0] != grids[1]:
        raise InvalidInputError(
            "two models with the same grid of patches",
            " and ".join("{} × {}".format(*grid) for grid in grids),
            "Give B an image of another size: other_image=viz.load_image(path, other, (H, W)).",
        )
    return page_of_two(first, second)


def _given(target: Any) -> Relevance | None:
    """Return a relevance that was computed already, which is what maps take."""
    if target is None or isinstance(target, Relevance):
        return target
    raise InvalidInputError(
        "a target together with a model, for maps what relevance returned",
        f"target={target!r}"[:80],
        "Pass target=relevance(model, images, target), or the model in place of the maps.",
    )


def _of_one_model(target: object) -> InvalidInputError:
    return InvalidInputError(
        "the relevance for a target on the page of one model",
        f"target={target!r}"[:80] + " and two models",
        "Leave other out, or the target.",
    )


def _of_model(
    model: nn.Module, image: Any, layers: RecordedLayers, heads: Heads, **about: Any
) -> ExplorerPage:
    held = _held(model, image, layers, heads, **about)
    return page_of(held.frame, held.kept, held.tables, held.whole)


def _held(
    model: nn.Module,
    image: Any,
    layers: RecordedLayers,
    heads: Heads,
    *,
    wanted: tuple[Any, Method] = (None, "chefer"),
    title: str,
    name: str,
    warning: str | None,
    max_mb: float,
) -> Held:
    """Return what a page holds of a model."""
    loaded = image_for(model, image)
    like = next(one for one in model.parameters() if one.is_floating_point())
    with grafted_inside(model), inference_on(loaded.tensor[None]):
        asked = asked_of(model, loaded.tensor[None].to(like.device, like.dtype), layers, heads)
        frame = Frame(
            *(loaded.picture, asked.shape, title, name, warning),
            *(_outliers(model, asked.images), 0, bytes_in(max_mb)),
            range_note=loaded.range_note(),
            explained=_explained(model, asked, *wanted),
        )
        coded, whole = _coded(asked, frame)
        kept = _rows_beside(coded, frame, asked.layers)
        tables: dict[int, Tables] = dict(_tables(asked, kept))
    kept.update(dict.fromkeys(coded, everything(asked.shape)))
    tables.update({layer: {"coded": one} for layer, one in coded.items()})
    return Held(frame, kept, dict(sorted(tables.items())), whole)


def _explained(model: nn.Module, asked: Asked, target: Any, method: Method) -> Explained | None:
    if target is None:
        return None
    found = target
    if not isinstance(target, Relevance):
        found = relevance(model, asked.images, target, method)
    return explained(found, asked.shape)


def _outliers(model: nn.Module, images: Tensor) -> ArtifactTokens | None:
    """Return the outliers to mark, or None for a model in which there is no way to find them."""
    with suppress(IncompatibleUpstreamError, InvalidInputError):
        return artifact_tokens(model, images)
    return None


def _coded(asked: Asked, frame: Frame) -> tuple[dict[int, CodedLayer], dict[int, int]]:
    """Return the layers that are kept as queries and keys, and what each layer takes as such."""
    layers = asked.layers
    if asked.heads is not None:
        return {}, {}
    found = {one.layer: candidate(one) for one in asked.queries_and_keys()}
    if not found or not smaller(found, frame.shape):
        return {}, {}
    whole = {layer: int(one.at(COARSEST)) for layer, one in found.items()}
    whole |= {layer: cost(everything(asked.shape), asked.shape) for layer in {*layers} - {*found}}
    room = room_for_layers(frame, layers)
    for share in (0.98, 0.9, 0.75, 0.5):  # estimates may be too low, of small layers above all
        least = reserved(len(layers) - len(found), frame.shape)
        chosen = fit(found, frame.shape, int(share * room) - least)
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


def _rows_beside(
    coded: Mapping[int, CodedLayer], frame: Frame, layers: list[int]
) -> dict[int, KeptRows]:
    """Choose the rows of the layers that are not ``coded``."""
    rest = [layer for layer in layers if layer not in coded]
    taken = sum(map(size_of, coded.values()))
    return rows_to_keep(frame, rest, layers, taken) if rest or not coded else {}


def _tables(asked: Asked, kept: dict[int, KeptRows]) -> dict[int, dict[str, Table]]:
    shape, tables = asked.shape, dict[int, dict[str, Table]]()
    # If a layer keeps only the first rows, no others are computed.
    few = shape.queries[: max(shape.prefix, 1)]
    used = {layer: rows.queries for layer, rows in kept.items() if rows != NOTHING}
    groups = {
        few: [layer for layer, queries in used.items() if queries <= set(few)],
        shape.queries: [layer for layer, queries in used.items() if not queries <= set(few)],
    }
    of = {layer: queries for queries, layers in groups.items() for layer in layers}

    def take(layer: int, weights: Tensor) -> None:
        tables[layer] = quantise_layer(weights, of[layer], kept[layer])

    if of:
        asked.weights({queries: layers for queries, layers in groups.items() if layers}, take)
    return tables
