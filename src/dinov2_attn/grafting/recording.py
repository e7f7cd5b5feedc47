"""The grafts that live as long as a recording: on classes, so that no module carries them.

Copies, pickles and exports of a model know of no recording. An attention class that ``install``
has grafted already keeps that graft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dinov2_attn.grafting.channel import (
    Receiver,
    graft_captured,
    graft_captured_list,
    graft_entrance,
    graft_whole,
    receiving,
)
from dinov2_attn.grafting.registry import LOCK, REGISTRY, Owner, RecordingTarget
from dinov2_attn.kernels.xformers import KERNEL, graft_captured_kernel, kernel_homes
from dinov2_attn.typing import Forward

Graft = Callable[[Forward], Forward]

# DINOv3's blocks call this method of their attention in training with stochastic depth.
LIST = "forward_list"


@contextmanager
def recording(
    receiver: Receiver,
    attentions: Iterable[nn.Module],
    entrances: Iterable[nn.Module] = (),
    wholes: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Give ``receiver`` the kernel calls of ``attentions`` in this thread.

    Args:
        receiver: Takes the calls.
        attentions: The attention modules.
        entrances: Modules that are given the images of a pass.
        wholes: Modules whose return ends a pass.

    """
    target, attentions = RecordingTarget(), list(attentions)
    with LOCK:
        for graft, modules in (
            (graft_captured, attentions),
            (graft_entrance, entrances),
            (graft_whole, wholes),
        ):
            for module in {_key(module): module for module in modules}.values():
                _graft(module, graft, target)
        for cls in {type(module) for module in attentions if hasattr(module, LIST)}:
            if not REGISTRY.claim(cls, LIST, target):
                REGISTRY.set(cls, LIST, graft_captured_list(getattr(cls, LIST)), target)
        for home in kernel_homes():
            if not REGISTRY.claim(home, KERNEL, target):
                REGISTRY.set(home, KERNEL, graft_captured_kernel(home[KERNEL]), target)
    try:
        with receiving(receiver):
            yield
    finally:
        with LOCK:
            REGISTRY.release(target)


def _graft(module: nn.Module, graft: Graft, target: RecordingTarget) -> None:
    owner: Owner = vars(module) if _is_its_own(module) else type(module)
    if REGISTRY.claim(owner, "forward", target):
        return
    if isinstance(owner, dict):
        own = module.forward  # bound, or a function without self
        REGISTRY.set(owner, "forward", _without_self(module, graft(_with_self(own))), target)
    else:
        REGISTRY.set(owner, "forward", graft(owner.forward), target)  # type: ignore[attr-defined]


def _key(module: nn.Module) -> object:
    """Return what modules share if one graft serves them all."""
    return module if _is_its_own(module) else type(module)


def _is_its_own(module: nn.Module) -> bool:
    """Return whether the class of ``module`` does not decide what runs, or is PyTorch's."""
    return "forward" in vars(module) or type(module).__module__.partition(".")[0] == "torch"


def _with_self(forward: Forward) -> Forward:
    def of_self(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return of_self


def _without_self(module: nn.Module, forward: Forward) -> Forward:
    def of_module(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    return of_module
