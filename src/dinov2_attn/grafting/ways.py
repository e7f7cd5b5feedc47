"""How the weights of a class are taken: from its projection, or from its kernel's own call.

The projection is faster where few rows are asked for, and graphs need it. It serves classes that
are proved to compute nothing else between projection and kernel. All others go by the kernel.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

# The classes whose weights are taken at the kernel, each with the reason.
_AT_KERNEL: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def go_by_kernel(cls: type, reason: str) -> None:
    """Take the weights of ``cls`` at the kernel from now on."""
    _AT_KERNEL[cls] = reason


def go_by_projection(cls: type) -> None:
    """Take the weights of ``cls`` from its projection from now on."""
    _AT_KERNEL.pop(cls, None)


def reason_for_kernel(cls: type) -> str | None:
    """Return why the weights of ``cls`` are taken at the kernel, None if they are not."""
    return next((_AT_KERNEL[base] for base in cls.__mro__ if base in _AT_KERNEL), None)


def source_of(cls: type) -> str:
    """Return where the weights of a grafted class come from, for people."""
    reason = reason_for_kernel(cls)
    if reason is None:
        return "weights from the projection (proved)"
    return f"weights at the kernel, because of the projection: {reason}"


def runs_itself(model: nn.Module) -> bool:
    """Return whether ``model`` has to run its own pass, because a part goes by the kernel."""
    return bool(_AT_KERNEL) and any(
        reason_for_kernel(cls) is not None for cls in {type(m) for m in model.modules()}
    )
