"""The second way out of a pass: each block is asked for its weights before it runs.

Graphs go this way. Dynamo cannot trace a ``TorchFunctionMode`` in every version, nor an exception
that ends a pass. A block that is asked projects its tokens, and projects them again when it runs.
In training with stochastic depth eager passes go this way too: a block that is asked answers for
all samples, also for those that it drops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dinov2_attn._compat import is_compiling
from dinov2_attn.backbone.projection import draws_nothing
from dinov2_attn.grafting.channel import ACTIVE, unpacked
from dinov2_attn.grafting.modules import ASKED
from dinov2_attn.typing import Forward


class _Result:
    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.next: _Result | None = None


class _Results:
    """The weights of the blocks of a pass in the order in which they ran, and the running block.

    A linked list, because Dynamo guards a list by its length. A block that is compiled by itself
    would be compiled again for every other block.
    """

    def __init__(self) -> None:
        self._first = self._last = _Result(None)
        self.running: nn.Module | None = None

    def add(self, weights: Any) -> None:
        """Add ``weights`` at the end."""
        result = _Result(weights)
        self._last.next = result
        self._last = result

    def all(self) -> tuple[Any, ...]:
        """Return all weights that were added."""
        found, result = [], self._first.next
        while result is not None:
            found.append(result.weights)
            result = result.next
        return tuple(found)


@contextmanager
def attentions_of_pass(**selection: Any) -> Iterator[_Results]:
    """Collect the attention of every block that runs inside, in the order in which they run.

    The weights come from the same tokens as the features. So they belong together even if a pass
    draws random numbers.

    Args:
        selection: ``queries`` and ``heads``.

    """
    results = _Results()

    def listen(
        original: Forward,
        weights_of: Forward,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # A grafted class calls its grafted base for the same block: only the first counts.
        outer = results.running
        if outer is block:
            return original(block, *args, **kwargs)
        # What the projection draws (LoRA's dropout) is drawn again by the pass itself.
        # Dynamo cannot trace that, so no graph may see it without need.
        draws = block.training and not (is_compiling() and draws_nothing(block))
        with _same_draws(*args, *kwargs.values()) if draws else nullcontext(), unpacked():
            results.add(weights_of(block, *args, **kwargs, **selection))
        results.running = block
        try:
            return original(block, *args, **kwargs)
        finally:
            results.running = outer

    before, ASKED.listener = ASKED.listener, listen
    try:
        with ACTIVE.active():
            yield results
    finally:
        ASKED.listener = before


def _same_draws(tokens: Any, *_: Any) -> AbstractContextManager[object]:
    device = tokens[0].device if isinstance(tokens, list) else tokens.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
