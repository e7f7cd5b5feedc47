"""Pictures of attention: the short name of ``dinov2_attn.apps.viz``.

>>> from dinov2_attn import attention_maps, viz
>>> viz.plot(attention_maps(model, images, queries="cls"), layer=11, head=3)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2_attn._lazy import lazily

if TYPE_CHECKING:
    from dinov2_attn.apps.viz import (
        Style,
        animate,
        plot,
        plot_heads,
        plot_layers,
        plot_masks,
        save,
    )

__all__ = ["Style", "animate", "plot", "plot_heads", "plot_layers", "plot_masks", "save"]

__getattr__, __dir__ = lazily(__name__, dict.fromkeys(__all__, "dinov2_attn.apps.viz"))
