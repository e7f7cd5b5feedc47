"""Pictures of attention: photographs in, heatmaps, overviews and films out.

>>> from dinov2_attn import attention_maps, show
>>> show.plot(attention_maps(model, images, queries="cls"), layer=11, head=3)

What is named here needs ``dinov2-attn[viz]`` and is imported with its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2_attn.show.pictures import plot, plot_heads, plot_layers, plot_masks
    from dinov2_attn.show.saving import animate, save
    from dinov2_attn.show.style import Style

__all__ = ["Style", "animate", "plot", "plot_heads", "plot_layers", "plot_masks", "save"]

_LATER = {
    "Style": "style",
    "animate": "saving",
    "plot": "pictures",
    "plot_heads": "pictures",
    "plot_layers": "pictures",
    "plot_masks": "pictures",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"dinov2_attn.show.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
