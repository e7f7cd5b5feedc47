"""``write_page``: existing attention maps as an interactive page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2_attn._files import write_file
from dinov2_attn.apps.explorer.assemble import Held, Tables, assemble, what_is_missing
from dinov2_attn.apps.explorer.budget import NOTHING, KeptRows, Shape, describe, left_out, plan
from dinov2_attn.apps.explorer.content import Frame, Outliers, bytes_in, explained
from dinov2_attn.apps.explorer.quantise import Table, quantise
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.places import place_of_layer
from dinov2_attn.maps.recording import Recording
from dinov2_attn.maps.relevance import Relevance
from dinov2_attn.math.attention import check_heads
from dinov2_attn.math.selection import layers_to_take
from dinov2_attn.typing import Grid, Heads, RecordedLayers


@dataclass(frozen=True)
class ExplorerPage:
    """An interactive page. A notebook shows it as the value of a cell.

    Attributes:
        content: The HTML file.
        kept: Which rows of which layers it holds, in words.
        left_out: What did not fit and what would keep it; empty if everything fits.

    """

    content: bytes = field(repr=False)
    kept: str
    left_out: str

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return len(self.content)

    def save(self, path: str | Path) -> None:
        """Write the page to ``path``, whole or not at all.

        Raises:
            UnwritableOutputError: if the file cannot be written. Missing folders are created.

        """
        write_file(path, self.content)

    def _repr_html_(self) -> str:
        # In a frame without the notebook's origin: the page needs scripts, and saves files.
        page = escape(self.content.decode())
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads allow-modals" '
            'width="100%" height="900" style="border: 0"></iframe>'
        )


def write_page(
    path: str | Path,
    picture: npt.NDArray[np.uint8],
    maps: AttentionMaps,
    *,
    title: str = "Attention",
    model: str = "",
    warning: str | None = None,
    outliers: Outliers | None = None,
    sample: int = 0,
    max_mb: float = 25.0,
) -> ExplorerPage:
    """Write the interactive page of one image of ``maps``, whole or not at all.

    >>> image = viz.load_image("cat.jpg", model)
    >>> maps = attention_maps(model, image.tensor[None])
    >>> write_page("page.html", image.picture, maps, title="cat.jpg")

    Args:
        path: Where to write the HTML file.
        picture: uint8 ``(H, W, 3)``: the image, cropped to whole patches.
        maps: Weights ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean of heads.
        title: The title of the page. Any text; it is escaped.
        model: What the caption calls the model.
        warning: A line that stands out, such as ``banner.NO_MEANING`` for random weights.
        outliers: The ``ArtifactTokens`` of the same images, to be marked.
        sample: Which image of the batch.
        max_mb: The maximum size of the page, in units of 1,000,000 bytes. ``budget.plan`` decides
            what is kept.

    Raises:
        InvalidInputError: if maps or picture cannot be shown, or not one row fits.
        OutOfRangeError: if there is no such sample.
        UnwritableOutputError: if the file cannot be written.

    """
    page = page_of_maps(
        picture,
        maps,
        title=title,
        model=model,
        warning=warning,
        outliers=outliers,
        sample=sample,
        max_mb=max_mb,
    )
    page.save(path)
    return page


def page_of_maps(
    picture: npt.NDArray[np.uint8],
    maps: AttentionMaps,
    *,
    title: str,
    model: str,
    warning: str | None,
    outliers: Outliers | None,
    sample: int,
    max_mb: float,
    found: Relevance | None = None,
) -> ExplorerPage:
    """Return the page that ``write_page`` writes."""
    if isinstance(maps, list | tuple):  # type: ignore[unreachable]  # of a list of batches
        raise InvalidInputError(
            "the maps of one batch",
            f"a {type(maps).__name__} of {len(maps)}",
            "A list of batches gives a list of maps: pass one of them, such as maps[0].",
        )
    entries = {
        layer: _entry(weights, sample)
        for layer, weights in zip(maps.numbers, maps.weights, strict=True)
    }
    shape = _shape(maps, entries)
    frame = Frame(
        *(picture, shape, title, model, warning, outliers, sample, bytes_in(max_mb)),
        explained=None if found is None else explained(found, shape, sample),
    )
    kept = rows_to_keep(frame, list(entries))
    tables = {
        layer: quantise_layer(weights, shape.queries, kept[layer])
        for layer, weights in entries.items()
        if kept[layer] != NOTHING
    }
    return page_of(frame, kept, tables)


def chosen(maps: Any, layers: RecordedLayers, heads: Heads) -> AttentionMaps:
    """Return the maps of one batch, with some layers only, or with the mean of heads."""
    check_heads(heads)
    if isinstance(maps, Recording):
        maps = maps.cpu()
    if not isinstance(maps, AttentionMaps) or (layers is None and heads is None):
        return maps  # type: ignore[no-any-return]  # page_of_maps refuses anything else
    places = _places(maps, layers)
    weights = [maps.weights[place] for place in places]
    if heads == "mean":
        weights = [each.mean(1) if each.ndim == 4 else each for each in weights]
    return replace(maps, weights=tuple(weights), layers=tuple(maps.layers[i] for i in places))


def _places(maps: AttentionMaps, layers: RecordedLayers) -> list[int]:
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, Sequence):
        return sorted({place_of_layer(maps.layers, layer) for layer in layers})  # type: ignore[arg-type]  # ints or paths
    return layers_to_take(layers, len(maps.layers))


def room_for_layers(frame: Frame, layers: list[int]) -> int:
    """Return how many bytes of the page ``layers`` may take."""
    bare = len(assemble(frame, {}, {}))
    # An upper bound for the sentences about the layers.
    said = 1000 + 500 * len(layers)
    return frame.limit - bare - said


def rows_to_keep(
    frame: Frame, layers: list[int], of: list[int] | None = None, taken: int = 0
) -> dict[int, KeptRows]:
    """Choose the rows of each of the ``layers`` so that the page stays below its limit.

    Args:
        frame: The page without weights.
        layers: The layers to choose rows of.
        of: All layers of the page, if there are others.
        taken: The bytes that the others take.

    """
    return plan(layers, frame.shape, room_for_layers(frame, of or layers) - taken)


def quantise_layer(weights: Tensor, queries: tuple[int, ...], rows: KeptRows) -> dict[str, Table]:
    """Quantise the kept rows of one layer.

    Args:
        weights: ``(heads, Q, N)``, or ``(Q, N)`` for the mean of heads.
        queries: The tokens of the Q rows.
        rows: The rows to keep.

    """
    wide = torch.promote_types(weights.dtype, torch.float32)
    tables = {}
    if rows.mean:
        mean = weights[None] if weights.ndim == 2 else weights.mean(0, keepdim=True, dtype=wide)
        tables["mean"] = quantise(_rows(mean, queries, rows.mean), rows.mean)
    if rows.each:
        tables["each"] = quantise(_rows(weights, queries, rows.each), rows.each)
    return tables


def page_of(
    frame: Frame,
    kept: Mapping[int, KeptRows],
    tables: Mapping[int, Tables],
    whole: Mapping[int, int] | None = None,
) -> ExplorerPage:
    """Return the page with these tables.

    Args:
        frame: The page without weights.
        kept: The rows of each layer that it keeps.
        tables: Their weights.
        whole: How many bytes each layer takes if all of it is kept. Default: as weights.

    """
    missing = _missing(frame, kept, whole)
    content = assemble(frame, kept, tables, missing)
    return ExplorerPage(content, describe(dict(kept), frame.shape), missing)


def _missing(
    frame: Frame, kept: Mapping[int, KeptRows], whole: Mapping[int, int] | None, models: int = 1
) -> str:
    lacking = left_out(dict(kept), frame.shape)
    return what_is_missing(frame, kept, lacking, whole, models) if lacking else ""


def page_of_two(first: Held, second: Held) -> ExplorerPage:
    """Return the page of two models of one grid. Each may have half of the room."""
    halves = {"A": first, "B": second}
    missing = " ".join(
        f"{letter}: {said}"
        for letter, held in halves.items()
        if (said := _missing(held.frame, held.kept, held.whole, 2))
    )
    kept = "; ".join(
        f"{letter}: {describe(dict(held.kept), held.frame.shape)}"
        for letter, held in halves.items()
    )
    content = assemble(first.frame, first.kept, first.tables, missing, second)
    return ExplorerPage(content, kept, missing)


def _rows(weights: Tensor, queries: tuple[int, ...], chosen: tuple[int, ...]) -> Tensor:
    if queries == chosen:
        return weights
    return weights[:, [queries.index(query) for query in chosen]]


def _entry(weights: Any, sample: int) -> Tensor:
    if getattr(weights, "ndim", 0) not in (3, 4):
        raise InvalidInputError(
            "weights (B, heads, Q, N) or (B, Q, N) for each layer",
            f"{type(weights).__name__}",
            "Pass the maps of one batch, as attention_maps or record return them.",
        )
    if not -len(weights) <= sample < len(weights):
        raise OutOfRangeError(
            f"a sample between 0 and {len(weights) - 1}", str(sample), "One page shows one image."
        )
    return torch.as_tensor(weights)[sample]


def checked_grid(maps: AttentionMaps) -> Grid:
    """Return the grid of ``maps``.

    Raises:
        InvalidInputError: unless the tokens of the maps are a prefix and one for each patch.

    """
    if maps.grid is not None and not maps.suffix and maps.per_cell == 1:
        return maps.grid
    tokens = f"{maps.suffix} tokens behind the patches"
    if maps.grid is None:
        tokens = f"no grid among {np.shape(maps.weights[0])[-1]} tokens"
    elif maps.per_cell != 1:
        tokens = f"{maps.per_cell} tokens for each cell"
    raise InvalidInputError(
        "a model whose last tokens are the patches, one for each cell of a grid",
        tokens,
        "A page cannot show it. Take its maps: attention_maps(model, images), or with a grid that "
        "you know: record(model, grid=(h, w), prefix=p).",
    )


def _shape(maps: AttentionMaps, entries: Mapping[int, Tensor]) -> Shape:
    grid = checked_grid(maps)
    maps.patch_maps()  # raises unless the columns are the prefix and the grid
    shapes = {tuple(weights.shape) for weights in entries.values()}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise InvalidInputError(
            "weights of one shape in every layer, with at least one row",
            ", ".join(map(str, shapes)) or "no layer",
            "Ask all layers for the same queries and heads.",
        )
    (shape,) = shapes
    queries = maps.queries or tuple(range(shape[-2]))
    heads = shape[0] if len(shape) == 3 else 0
    return Shape(heads, tuple(queries), maps.prefix, grid)
