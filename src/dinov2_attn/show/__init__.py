"""Pictures of attention: photographs in, heatmaps, overviews and films out.

>>> from dinov2_attn import attention_maps, show
>>> show.plot(attention_maps(model, images, queries="cls"), layer=11, head=3)

What is named here needs ``dinov2-attn[viz]`` and is imported with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2_attn.lazy import lazily

if TYPE_CHECKING:
    from dinov2_attn.show.pictures import plot, plot_heads, plot_layers, plot_masks
    from dinov2_attn.show.saving import animate, save
    from dinov2_attn.show.style import Style

__all__ = ["Style", "animate", "plot", "plot_heads", "plot_layers", "plot_masks", "save"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Style": "dinov2_attn.show.style",
        "animate": "dinov2_attn.show.saving",
        "plot": "dinov2_attn.show.pictures",
        "plot_heads": "dinov2_attn.show.pictures",
        "plot_layers": "dinov2_attn.show.pictures",
        "plot_masks": "dinov2_attn.show.pictures",
        "save": "dinov2_attn.show.saving",
    },
)
