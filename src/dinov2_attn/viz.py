"""Pictures of attention: load an image, plot its maps, explore them in a page.

>>> from dinov2_attn import attention_maps, viz
>>> image = viz.load_image("cat.jpg", model)
>>> maps = attention_maps(model, image.tensor[None], queries="cls")
>>> viz.plot(maps, layer=11, head=3, image=image)
>>> viz.explore(model, image, "cat.html")

These names need ``dinov2-attn[viz]``. Each is imported at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dinov2_attn._imports import lazily, require

if TYPE_CHECKING:
    from dinov2_attn.apps.explorer.explore import explore
    from dinov2_attn.apps.viz.compare import compare
    from dinov2_attn.apps.viz.components import pca
    from dinov2_attn.apps.viz.figure import PaperFigure, figure
    from dinov2_attn.apps.viz.images import LoadedImage, load_image
    from dinov2_attn.apps.viz.pictures import plot, plot_heads, plot_layers, plot_masks
    from dinov2_attn.apps.viz.saving import animate, save
    from dinov2_attn.apps.viz.statistics import plot_received, plot_statistics
    from dinov2_attn.apps.viz.style import Style

__all__ = [
    "LoadedImage",
    "PaperFigure",
    "Style",
    "animate",
    "compare",
    "explore",
    "figure",
    "load_image",
    "pca",
    "plot",
    "plot_heads",
    "plot_layers",
    "plot_masks",
    "plot_received",
    "plot_statistics",
    "save",
]

_MODULES = {
    "LoadedImage": "dinov2_attn.apps.viz.images",
    "PaperFigure": "dinov2_attn.apps.viz.figure",
    "Style": "dinov2_attn.apps.viz.style",
    "animate": "dinov2_attn.apps.viz.saving",
    "compare": "dinov2_attn.apps.viz.compare",
    "explore": "dinov2_attn.apps.explorer.explore",
    "figure": "dinov2_attn.apps.viz.figure",
    "load_image": "dinov2_attn.apps.viz.images",
    "pca": "dinov2_attn.apps.viz.components",
    "picture_of": "dinov2_attn.apps.viz.notebook",
    "plot": "dinov2_attn.apps.viz.pictures",
    "plot_heads": "dinov2_attn.apps.viz.pictures",
    "plot_layers": "dinov2_attn.apps.viz.pictures",
    "plot_masks": "dinov2_attn.apps.viz.pictures",
    "plot_received": "dinov2_attn.apps.viz.statistics",
    "plot_statistics": "dinov2_attn.apps.viz.statistics",
    "save": "dinov2_attn.apps.viz.saving",
}


_import, __dir__ = lazily(__name__, _MODULES)


def __getattr__(name: str) -> Any:
    # Public names need the libraries for pictures; the error names all that are missing.
    if name in __all__:
        require("torchvision", "matplotlib", "PIL")
    return _import(name)
