"""The attention of DINOv2, proven right.

>>> import dinov2_attn
>>> handle = dinov2_attn.install()

From here on upstream's own models answer ``get_self_attention``,
``get_last_self_attention`` and ``return_attention=True``.
"""

from typing import TYPE_CHECKING

from dinov2_attn.errors import (
    Dinov2AttnError,
    IncompatibleUpstream,
    InvalidInput,
    KernelFallback,
    NoOperator,
    NotGrafted,
    OutOfRange,
    PatchedOnTop,
    Unavailable,
    UnreadableFile,
    UnwritableOutput,
    UpstreamDrift,
)
from dinov2_attn.surgery.install import Handle, Status, install, status, uninstall

if TYPE_CHECKING:
    from dinov2_attn.maps.rollout import rollout

__all__ = [
    "Dinov2AttnError",
    "Handle",
    "IncompatibleUpstream",
    "InvalidInput",
    "KernelFallback",
    "NoOperator",
    "NotGrafted",
    "OutOfRange",
    "PatchedOnTop",
    "Status",
    "Unavailable",
    "UnreadableFile",
    "UnwritableOutput",
    "UpstreamDrift",
    "install",
    "rollout",
    "status",
    "uninstall",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for."""
    if name == "rollout":
        from dinov2_attn.maps.rollout import rollout

        return rollout
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
