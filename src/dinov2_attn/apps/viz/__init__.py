"""Pictures of attention: photographs in, heatmaps, overviews and films out.

>>> from dinov2_attn import attention_maps, viz
>>> viz.plot(attention_maps(model, images, queries="cls"), layer=11, head=3)

What is named here needs ``dinov2-attn[viz]`` and is imported with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2_attn._lazy import lazily

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.pictures import plot, plot_heads, plot_layers, plot_masks
    from dinov2_attn.apps.viz.saving import animate, save
    from dinov2_attn.apps.viz.style import Style

__all__ = ["Style", "animate", "plot", "plot_heads", "plot_layers", "plot_masks", "save"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Style": "dinov2_attn.apps.viz.style",
        "animate": "dinov2_attn.apps.viz.saving",
        "picture_of": "dinov2_attn.apps.viz.notebook",
        "plot": "dinov2_attn.apps.viz.pictures",
        "plot_heads": "dinov2_attn.apps.viz.pictures",
        "plot_layers": "dinov2_attn.apps.viz.pictures",
        "plot_masks": "dinov2_attn.apps.viz.pictures",
        "save": "dinov2_attn.apps.viz.saving",
    },
)
