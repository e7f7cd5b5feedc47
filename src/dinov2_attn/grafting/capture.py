"""What the grafts do while a thread records: run upstream's pass, and hand on what it used.

Queries and keys are those that the pass itself projects. A hook that lives as long as one
call sees them last, behind adapters and everybody else's hooks, so nothing runs twice and
nothing stays on a module between calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from dinov2_attn._compat import is_compiling, is_in_backward, is_transformed
from dinov2_attn.backbone.contract import name_of
from dinov2_attn.errors import NotRecordedError
from dinov2_attn.grafting.channel import STATE, unpacked, unrecorded
from dinov2_attn.typing import Forward


def run_recorded(
    original: Forward,
    module: Any,
    weights_of: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run ``original`` on an attention ``module``, and give its weights to who wants them.

    Inside nobody is told of anything: the base class's graft runs for the same module, and
    whoever takes weights may ask or run models meanwhile.
    """
    wanting = [recorder for recorder in STATE.recorders if recorder.wants(module)]
    if wanting and is_transformed():
        raise in_a_graph()
    with unrecorded():
        if not wanting or is_in_backward():
            return original(module, *args, **kwargs)

        def take(projected: Tensor) -> None:
            weigh = partial(weights_of, module, args, kwargs, projected=projected)
            with unpacked():
                for recorder in wanting:
                    recorder.take(module, weigh)

        with _Listening(module.qkv, take) as listening:
            output = original(module, *args, **kwargs)
    if listening.calls != 1:
        raise NotRecordedError(
            f"{name_of(type(module))} to call its qkv once in a pass",
            f"{listening.calls} calls",
            "Where qkv itself was compiled, run it in eager mode to record.",
        )
    return output


def prepare_recorded(
    original: Forward, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a vision transformer's ``original`` on images, and tell recorders that a pass began."""
    with unrecorded() as recorders:  # an override calls its base's graft
        tokens = original(model, *args, **kwargs)
    if is_compiling() or is_in_backward():  # the attention decides whether that may be
        return tokens
    images = args[0] if args else kwargs.get("x")
    for recorder in recorders:
        recorder.begin(model, images)
    return tokens


def in_a_graph() -> NotRecordedError:
    """Return the error for a recording that a graph would not repeat."""
    return NotRecordedError(
        "a forward pass in eager mode inside record(...)",
        "one that torch.compile, torch.export or torch.func makes another function of, whose "
        "values end with it",
        "Run the eager module: compiled._orig_mod(images), or compiled(images) under "
        'torch.compiler.set_stance("force_eager"). Run exported and transformed models outside of '
        "record(...).",
    )


class _Listening:
    """Call ``take`` with what ``layer`` returns to this thread, as its last hook."""

    # To other threads, which may ask the same layer meanwhile, it is as if it were not there.
    only_listens = True

    def __init__(self, layer: nn.Module, take: Callable[[Tensor], None]) -> None:
        self._layer, self._take, self._thread = layer, take, threading.get_ident()
        self._taking = False
        self.calls = 0

    def __enter__(self) -> _Listening:
        self._hook = self._layer.register_forward_hook(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def __call__(self, _: nn.Module, __: object, projected: Tensor) -> None:
        # Other threads run the same layer, and whoever takes may run it too.
        if threading.get_ident() == self._thread and not self._taking:
            self.calls += 1
            self._taking = True
            self._take(projected)
            self._taking = False
