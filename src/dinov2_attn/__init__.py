"""The attention of DINOv2, proven right.

>>> import dinov2_attn
>>> handle = dinov2_attn.install()

From here on upstream's own models answer ``get_self_attention``,
``get_last_self_attention`` and ``return_attention=True``.
"""

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
    "status",
    "uninstall",
]

__version__ = "0.1.0"
