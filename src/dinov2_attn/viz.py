"""Pictures of attention: the short name of ``dinov2_attn.apps.viz``.

>>> from dinov2_attn import attention_maps, viz
>>> image = viz.load_image("cat.jpg", model)
>>> viz.plot(attention_maps(model, image.tensor[None], queries="cls"), image=image)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2_attn.apps.viz import lazy_names

if TYPE_CHECKING:
    from dinov2_attn.apps.viz import (
        LoadedImage,
        Style,
        animate,
        explore,
        load_image,
        plot,
        plot_heads,
        plot_layers,
        plot_masks,
        save,
    )

__all__ = [
    "LoadedImage",
    "Style",
    "animate",
    "explore",
    "load_image",
    "plot",
    "plot_heads",
    "plot_layers",
    "plot_masks",
    "save",
]

__getattr__, __dir__ = lazy_names(__name__)
