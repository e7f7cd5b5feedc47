"""Principal components of queries, keys or values as colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.places import place_of_layer
from dinov2_attn.maps.recording import Recording
from dinov2_attn.math.components import principal_components
from dinov2_attn.typing import Facet, Layer

if TYPE_CHECKING:
    from torch import Tensor

# Inches of the height of an image.
SIDE = 3.0


def pca(
    maps: AttentionMaps[Any] | Recording[Any], facet: Facet = "key", *, layer: Layer | None = None
) -> Figure:
    """Draw the first three principal components of patches as red, green and blue.

    >>> with record(model, facets=("key",)) as maps:
    ...     model(images)
    >>> viz.pca(maps).savefig("keys.png")

    One analysis serves all images of the batch, so that equal colours mean similar patches. Each
    component goes from its minimum to its maximum.

    Args:
        maps: What ``record(model, facets=…)`` yields, or one of its passes.
        facet: ``"query"``, ``"key"`` or ``"value"``, with heads joined.
        layer: The layer; the last one by default.

    Returns:
        A figure with the images of the batch side by side.

    Raises:
        InvalidInputError: The facet was not recorded, or the patch grid is unknown.
        OutOfRangeError: The layer was not recorded.

    """
    features: Tensor = maps.facet_maps(facet)[place_of_layer(maps.layers, layer)]
    found = principal_components(features)
    low, high = (function(found, (0, 2, 3)) for function in (_least, _largest))
    colours = ((found - low) / (high - low).clamp(min=1e-30)).movedim(1, -1).cpu().numpy()
    count, height, width, _ = colours.shape
    figure = Figure(figsize=(count * SIDE * width / height, SIDE), layout="constrained")
    for number, image in enumerate(colours):
        axes = figure.add_subplot(1, count, number + 1)
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
    return figure


def _least(tensor: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    return tensor.amin(dimensions, keepdim=True)


def _largest(tensor: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    return tensor.amax(dimensions, keepdim=True)
