"""The gradients of a target that is made of the tokens behind each layer in turn.

In the first pass every layer runs, and the tokens behind each block are kept. In each further pass
they take the place of what the last block returns, so that the rest of the model makes the target
of them. Only the block of that layer is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.watching import watching
from dinov2_attn.grafting.channel import unrecorded
from dinov2_attn.maps.calls import keep_calls
from dinov2_attn.maps.chain import blocks_around
from dinov2_attn.maps.graded import Graded, GradedCalls
from dinov2_attn.maps.targets import Pass, Target, score, watching_norm
from dinov2_attn.typing import RecordedLayers


def gradients_of_each_layer(
    calls: GradedCalls,
    model: nn.Module,
    layers: RecordedLayers,
    run: Callable[[], Any],
    images: Tensor,
    target: Target,
) -> tuple[Layout, list[Graded]]:
    """Return the layout of the tokens, and each call with the gradient of its own target.

    Raises:
        IncompatibleUpstreamError: If the layers are in no list of blocks.

    """
    attentions = list(calls.modules.all)
    blocks = blocks_around(model, attentions)
    behind: dict[nn.Module, Any] = {}
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(watching(block, after=partial(_keep, behind, block)))
        keep_calls(calls, model, layers, run)
    layout = calls.layout(images)
    graded = []
    for number, (attention, _) in enumerate(calls.found):
        place = attentions.index(attention)
        output, normed = _with_tokens(calls, blocks[-1], behind[blocks[place]], run)
        total = score(target, Pass(layout, output, normed), len(images))
        before = list(_tensors(behind[blocks[place - 1]])) if place else [images]
        calls.differentiate(total, before, [number], retain=True)
        graded.append(calls.take_graded(number))
    return layout, graded


def _with_tokens(
    calls: GradedCalls, last: nn.Module, tokens: Any, run: Callable[[], Any]
) -> tuple[Any, list[Tensor]]:
    """Return what the model returns if its last block returns ``tokens``."""
    normed: list[Tensor] = []
    with (
        unrecorded(),
        watching(last, after=lambda _: tokens),
        watching_norm(calls.modules, normed),
    ):
        return run(), normed


def _keep(behind: dict[nn.Module, Any], block: nn.Module, output: Any) -> None:
    behind[block] = output


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a block returned that have a gradient."""
    for one in output if isinstance(output, list | tuple) else [output]:
        if isinstance(one, Tensor) and one.requires_grad:
            yield one
