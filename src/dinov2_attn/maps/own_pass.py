"""What a model's own pass gives to its kernels, where its blocks cannot be walked from outside.

DINOv3's blocks are given a rotation, others adapters or further arguments. So the model itself
runs, and queries and keys are those of the kernel calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.contract import name_of
from dinov2_attn.backbone.projection import Piece
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.channel import unrecorded
from dinov2_attn.grafting.collector import Collector
from dinov2_attn.grafting.recording import recording
from dinov2_attn.kernels.call import FusedCall, KernelCall
from dinov2_attn.kernels.capture import StopPassError, check_calls
from dinov2_attn.math.selection import to_index
from dinov2_attn.typing import Queries

# Queries, keys and the scale of their products.
Scored = tuple[Tensor, Tensor, float]


class _Scores(Collector):
    """Keeps queries and keys in place of weights."""

    def take(self, attention: nn.Module, call: KernelCall) -> None:
        """Keep what the weights are made of."""
        if not isinstance(call, FusedCall) or call.bias is not None or call.is_causal:
            raise InvalidInputError(
                "attention by a fused kernel that sees all tokens alike",
                f"{name_of(type(attention))} with "
                + ("a causal or masked kernel" if isinstance(call, FusedCall) else "a softmax"),
                "Use get_self_attention, whose weights include it.",
            )
        self.weights.append((call.query, call.key, call.scale))


def scores_of_pass(
    backbone: Backbone,
    images: Tensor,
    masks: Any,
    wanted: Sequence[int],
    outputs: dict[int, Tensor] | None = None,
) -> list[Scored]:
    """Return the queries, keys and scales of the blocks ``wanted``, in one pass of the model.

    Args:
        backbone: The vision transformer.
        images: Images ``(B, C, H, W)``.
        masks: None or boolean ``(B, h·w)``.
        wanted: Numbers of blocks in ascending order.
        outputs: Filled with the tokens ``(B, N, C)`` that the blocks in it return. Without it the
            pass ends after the last block that is wanted.

    Raises:
        InvalidInputError: If a mask decides about the weights too, there is no fused kernel, or
            stochastic depth drops samples.

    """
    if any(b.training and getattr(b, "sample_drop_ratio", None) for b in backbone.blocks):
        raise InvalidInputError(
            "a model that runs all samples of a batch through each block",
            "one in training, which drops some of them",
            "Call model.eval() first.",
        )
    modules = {m: i for m, i in backbone.attentions().items() if i in wanted}
    scores = _Scores(modules, None if outputs is not None else len(wanted))
    given = {} if masks is None else {"masks": masks}
    run = partial(getattr(backbone.model, "forward_features", backbone.model), images, **given)
    passing = suppress(StopPassError)
    with unrecorded(), recording(scores, modules), _kept(backbone, outputs), passing:
        run()
    check_calls(len(scores.weights), name_of(type(backbone.model)), len(wanted))
    return scores.weights


def pieces(scored: Scored, queries: Queries) -> list[tuple[Piece, float]]:
    """Return the whole batch as one piece, with the rows of ``queries``."""
    query, key, scale = scored
    rows = query[:, :, to_index(queries, query.shape[2])]
    return [(Piece(slice(None), rows, key, query.shape[-1]), scale)]


@contextmanager
def _kept(backbone: Backbone, outputs: dict[int, Tensor] | None) -> Iterator[None]:
    """Keep what the blocks return that ``outputs`` has numbers of."""

    def keep(number: int, _: nn.Module, __: Any, output: Any) -> None:
        # A model may run a batch as a list of one.
        tokens = output[0] if isinstance(output, list | tuple) else output
        if outputs is not None:
            outputs[number] = tokens

    with ExitStack() as hooks:
        for number in outputs or ():
            hook = backbone.blocks[number].register_forward_hook(partial(keep, number))
            hooks.callback(hook.remove)
        yield
