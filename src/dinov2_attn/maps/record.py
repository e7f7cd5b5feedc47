"""Recording ordinary forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, overload

from torch import Tensor, nn

from dinov2_attn._compat import is_compiling, raised_by_dynamo
from dinov2_attn.backbone.backbone import backbone_in
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.grafting.channel import ACTIVE, STATE, in_a_graph
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.course import Course, advice
from dinov2_attn.maps.recording import Recording
from dinov2_attn.maps.result import W
from dinov2_attn.math.attention import check_heads
from dinov2_attn.math.buffers import Preallocated, ReusableBuffer
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Grid, Heads, Layers, Model, Queries

Reduce = Callable[[int, Tensor], W]


@overload
def record(
    model: Model,
    layers: Layers = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
    reduce: None = None,
) -> AbstractContextManager[Recording[Tensor]]: ...
@overload
def record(
    model: Model,
    layers: Layers = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
    reduce: Reduce[W],
) -> AbstractContextManager[Recording[W]]: ...


@contextmanager
def record(
    model: Model,
    layers: Layers = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
    reduce: Reduce[Any] | None = None,
) -> Iterator[Recording[Any]]:
    """Record the attention of every ordinary forward pass inside a ``with`` block.

    >>> with record(model, queries="cls") as maps:
    ...     depth = model(images)
    >>> maps.weights, maps.grid, maps.prefix

    Features are bit for bit those of an unrecorded pass. The weights are those of the
    queries and keys that the pass itself projects, ``(B, heads, Q, N)`` or ``(B, Q, N)``.
    In training with stochastic depth they are those of the samples that upstream kept. With
    grad on they are part of the graph and keep it alive; under reentrant checkpointing they
    are not.

    Recordings may be nested, of the same model or another. A question inside the block
    (``get_self_attention``, ``return_attn``) is answered and not recorded; a pass with
    ``return_attention=True`` is recorded like any other. Other threads, and so the replicas
    of ``DataParallel``, are not recorded.

    Args:
        model: A DINOv2, or a model that contains one and runs it in any way.
        layers: ``None`` for all blocks, an int for the last so many, or a sequence of blocks.
        queries: The tokens whose rows are wanted, as in ``attention_maps``.
        heads: ``None`` for each head, ``"mean"`` for their mean.
        reduce: ``reduce(layer, weights)`` is kept in place of the weights of one batch. It is
            called before the layer's own kernel runs, so that a full matrix need not outlive
            it: all layers take the memory of one. Weights, or a view of them, that something
            refers to are kept; other memory is reused by the next layer.

    Yields:
        The ``Recording``, a sequence of ``AttentionMaps``.

    Raises:
        InvalidInputError: ``model`` does not contain exactly one DINOv2.
        NotGraftedError: ``install`` has not reached it.
        NotRecordedError: At the end of the block, if no pass was recorded or one lacks layers
            (an exported model, an exception caught inside). In the block, if
            ``torch.compile``, ``torch.export`` or ``torch.func`` would make another function
            of a pass.

    """
    recorder = _Recorder(model, layers, queries, heads, reduce)
    STATE.recorders = (*STATE.recorders, recorder)
    try:
        with ACTIVE.active():
            yield recorder.recording
    except Exception as error:
        # Dynamo wraps what is raised while it traces, and keeps only the words.
        if raised_by_dynamo(error) and NotRecordedError.__name__ in str(error):
            raise in_a_graph() from error
        raise
    finally:
        STATE.recorders = tuple(other for other in STATE.recorders if other is not recorder)
    recorder.check()


class _Recorder:
    """Assembles layers to passes: one begins with its images and ends with its last layer."""

    def __init__(
        self,
        model: Model,
        layers: Layers,
        queries: Queries,
        heads: Heads,
        reduce: Reduce[Any] | None,
    ) -> None:
        check_heads(heads)
        if not (reduce is None or callable(reduce)):
            raise InvalidInputError(
                "reduce to be None or a function of a layer's number and its weights",
                f"{type(reduce).__name__}",
                "Pass, for instance, lambda layer, weights: weights.mean(1).cpu().",
            )
        self._backbone = backbone_in(model)
        self._prefix = self._backbone.prefix
        self._layers = self._backbone.attentions(layers)
        self._others = self._backbone.other_attentions(self._layers)
        self._course = Course()
        self._queries = self._backbone.resolve_names(queries)
        self._selection = {
            "queries": self._queries,
            "heads": heads,
            "new": (
                Preallocated(len(self._layers)) if reduce is None else ReusableBuffer()
            ).allocate,
        }
        self._reduce = reduce
        self._grids: list[Grid | None] = []
        self._kept: dict[int, list[Any]] = {}
        self._whole, self._broken = 0, 0
        # Of the current pass: whether images were seen, and whether no layer ran again too early.
        self._begun, self._clean = False, True
        self.recording: Recording[Any] = Recording()

    def begin(self, model: nn.Module, images: Tensor | None) -> None:
        """Note the patch grid of ``images``; batches of a list come one by one."""
        if model is self._backbone.model:
            self._end_pass()
            self._begun = True
            self._grids.append(None if images is None else self._backbone.grid(images))

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is that of a layer to record."""
        if attention in self._others and not is_compiling():
            self._course.ran(self._others[attention])
        return attention in self._layers

    def take(self, attention: nn.Module, weigh: Callable[..., Any]) -> None:
        """Keep the weights of a layer, or what ``reduce`` makes of them."""
        layer = self._layers[attention]
        self._course.ran(layer)
        if layer in self._kept:
            self._break_off()
        weights = weigh(**self._selection)
        batches = weights if isinstance(weights, list) else [weights]
        if any(len(kept) != len(batches) for kept in self._kept.values()):
            self._break_off()
        layouts = self._layouts_of(batches)
        self._kept[layer] = [self._reduced(layer, one) for one in batches]
        if len(self._kept) == len(self._layers):
            self._end_layers(layouts)

    def _reduced(self, layer: int, weights: Tensor) -> Any:
        return weights if self._reduce is None else self._reduce(layer, weights)

    def _layouts_of(self, batches: list[Tensor]) -> list[tuple[Grid | None, tuple[int, ...]]]:
        """Return the patch grid and the positions of the rows of each batch."""
        # Tokens may be prepared and not used: the last ones belong to this pass.
        recent = ([None] * len(batches) + self._grids)[-len(batches) :]
        lengths = [one.shape[-1] for one in batches]
        return [
            (
                grid if grid and math.prod(grid) == length - self._prefix else None,
                positions(self._queries, length),
            )
            for grid, length in zip(recent, lengths, strict=True)
        ]

    def _end_layers(self, layouts: list[tuple[Grid | None, tuple[int, ...]]]) -> None:
        """Append what was kept of all layers to the recording, one entry for each batch."""
        layers = tuple(self._layers.values())
        batches = zip(*(self._kept[layer] for layer in layers), strict=True)
        self.recording.passes += [
            AttentionMaps(kept, layers, grid, self._prefix, rows)
            for kept, (grid, rows) in zip(batches, layouts, strict=True)
        ]
        self._whole += 1
        self._grids, self._kept = [], {}
        if self._clean and not self._begun:
            self._course.end(whole=True)

    def check(self) -> None:
        """Raise ``NotRecordedError`` unless there were passes, and each with all of its layers."""
        self._end_pass()
        if self._broken or not self._whole:
            layers = list(self._layers.values())
            calls = self._course.calls(layers)
            raise NotRecordedError(
                "forward passes inside record(...), each with the layers "
                + ", ".join(map(str, layers)),
                f"{self._whole} of them"
                + (f", and {self._broken} without some of these layers" if self._broken else "")
                + (f": {self._course.describe(layers)}" if calls else ""),
                advice(calls)
                if calls
                else "Run the model inside the block, in the same thread, as an eager module (no "
                "exported, scripted or replicated one), and let exceptions leave the block.",
            )

    def _end_pass(self) -> None:
        whole = self._clean and not self._kept and self._whole > 0
        if self._kept:
            self._break_off()
        self._course.end(whole=whole)
        self._begun, self._clean = False, True

    def _break_off(self) -> None:
        self._broken += 1
        self._clean = False
        self._grids, self._kept = [], {}
