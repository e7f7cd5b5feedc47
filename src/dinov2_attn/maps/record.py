"""Recording ordinary forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, overload

from torch import Tensor, nn

from dinov2_attn._compat import is_compiling, raised_by_dynamo
from dinov2_attn.backbone.backbone import backbone_in
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.grafting.channel import ACTIVE, STATE, in_a_graph
from dinov2_attn.maps.attention_maps import AttentionMaps, W
from dinov2_attn.maps.course import Course, advice
from dinov2_attn.math.attention import check_heads
from dinov2_attn.math.buffers import Preallocated, ReusableBuffer
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Grid, Heads, Layers, Model, Queries

if TYPE_CHECKING:
    import numpy.typing as npt

Reduce = Callable[[int, Tensor], W]


class Recording(Generic[W]):
    """What ``record`` yields: one ``AttentionMaps`` for each forward pass, in ``passes``.

    Where there was one pass, the recording answers for it: ``maps.weights`` is
    ``maps.passes[0].weights``, and so on. ``passes`` is a plain list: in a long loop, take
    from it what is needed and clear it.
    """

    def __init__(self) -> None:
        self.passes: list[AttentionMaps[W]] = []

    @property
    def weights(self) -> tuple[W, ...]:
        """The ``weights`` of the one pass."""
        return self._one("weights").weights

    @property
    def layers(self) -> tuple[int, ...]:
        """The ``layers`` of the one pass."""
        return self._one("layers").layers

    @property
    def grid(self) -> Grid | list[Grid | None] | None:
        """The ``grid`` of the one pass."""
        return self._one("grid").grid

    @property
    def prefix(self) -> int:
        """The ``prefix`` of the one pass."""
        return self._one("prefix").prefix

    @property
    def queries(self) -> tuple[int, ...] | list[tuple[int, ...]] | None:
        """The ``queries`` of the one pass."""
        return self._one("queries").queries

    def patch_maps(self) -> tuple[W, ...]:
        """Return the ``maps()`` of the one pass."""
        return self._one("maps").patch_maps()

    def prefix_mass(self) -> tuple[W, ...]:
        """Return the ``prefix_mass()`` of the one pass."""
        return self._one("prefix_mass").prefix_mass()

    def cpu(self) -> AttentionMaps[W]:
        """Return the one pass on the CPU and outside of autograd's graph."""
        return self._one("cpu").cpu()

    @overload
    def numpy(self: Recording[Tensor]) -> AttentionMaps[npt.NDArray[Any]]: ...
    @overload
    def numpy(self: Recording[list[Tensor]]) -> AttentionMaps[list[npt.NDArray[Any]]]: ...

    def numpy(self: Recording[Any]) -> AttentionMaps[Any]:
        """Return the one pass with NumPy arrays for tensors."""
        return self._one("numpy").numpy()

    def save(self, path: str | Path) -> None:
        """Write the one pass to one safetensors file, as ``AttentionMaps.save`` does."""
        self._one("save").save(path)

    def _one(self, name: str) -> AttentionMaps[W]:
        if len(self.passes) != 1:
            raise NotRecordedError(
                f"one recorded pass, whose {name} that is",
                f"{len(self.passes)}",
                "Each forward pass is an entry of .passes.",
            )
        return self.passes[0]


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

    =======  =========================================================================
    model    a DINOv2, or a model that contains one (and runs it in whatever way)
    layers        ``None``: all blocks; an int: the last ``n``; a sequence: those
    queries  the rows, as in ``get_self_attention``
    heads    ``None`` (each) or ``"mean"``
    reduce   ``reduce(layer, weights)`` is kept in place of the weights. It is called
             before the layer's own kernel runs, so that a full matrix need not outlive
             it: all layers take the memory of one. Whoever holds the weights, or a view
             of them, keeps them; memory that nobody holds is the next layer's
    =======  =========================================================================

    Features are bit for bit those of an unrecorded pass. The weights are those of the
    queries and keys that the pass itself projects, ``(B, heads, Q, N)`` or ``(B, Q, N)``;
    a list of batches gives lists. In training with stochastic depth they are those of the
    samples that upstream kept. With grad on they are part of the graph, and so keep it
    alive; under reentrant checkpointing they are not.

    Recordings may be nested, of the same model or another. What is asked inside
    (``get_self_attention``, ``return_attn``) is answered and not recorded; a pass with
    ``return_attention=True`` is one like any other. Other threads, and so the replicas
    of ``DataParallel``, are not recorded.

    Raises ``InvalidInputError`` unless there is exactly one DINOv2 in ``model``,
    ``NotGraftedError`` where ``install`` has not reached it, and ``NotRecordedError`` at the end of
    the block where no pass was recorded or one lacks layers (an exported model, an exception caught
    inside), and in the middle of it where ``torch.compile``, ``torch.export`` or ``torch.func``
    would make another function of one.
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
    """Puts layers together to passes: one begins with its images and ends with its last layer."""

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
        self._kept: dict[int, Any] = {}
        self._whole, self._broken = 0, 0
        # Of the pass that runs: whether images were seen, and whether no layer ran again too early.
        self._begun, self._clean = False, True
        self.recording: Recording[Any] = Recording()

    def begin(self, model: nn.Module, images: Tensor | None) -> None:
        """Note the patch grid of ``images``; several before the first layer make a list."""
        if model is self._backbone.model:
            self._end_pass()
            self._begun = True
            self._grids.append(None if images is None else self._backbone.grid(images))

    def wants(self, attention: nn.Module) -> bool:
        """Say whether ``attention`` is that of a layer to record."""
        if attention in self._others and not is_compiling():
            self._course.ran(self._others[attention])
        return attention in self._layers

    def take(self, attention: nn.Module, weigh: Callable[..., Any]) -> None:
        """Keep the weights of a layer, or what is to be kept of them."""
        layer = self._layers[attention]
        self._course.ran(layer)
        if layer in self._kept:
            self._clean = False
            self._break_off()
        weights = weigh(**self._selection)
        grid, queries = self._grid_for(weights), self._queries_of(weights)
        self._kept[layer] = weights if self._reduce is None else self._reduce(layer, weights)
        if len(self._kept) == len(self._layers):
            layers = tuple(self._layers.values())
            kept = tuple(self._kept[layer] for layer in layers)
            maps = AttentionMaps(kept, layers, grid, self._prefix, queries)
            self.recording.passes.append(maps)
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
        self._grids, self._kept = [], {}

    def _grid_for(self, weights: Any) -> Any:
        """Return the grid of each batch that ``weights`` belong to; a list for a list."""
        each = weights if isinstance(weights, list) else [weights]
        # Tokens may be prepared and not used: the last ones belong to this pass.
        recent = [None] * len(each) + self._grids
        grids = [
            grid if grid and math.prod(grid) == one.shape[-1] - self._prefix else None
            for grid, one in zip(recent[-len(each) :], each, strict=True)
        ]
        return grids if isinstance(weights, list) else grids[0]

    def _queries_of(self, weights: Any) -> Any:
        """Return the positions of the rows of ``weights``; a list for a list."""
        if isinstance(weights, list):
            return [self._queries_of(one) for one in weights]
        return positions(self._queries, weights.shape[-1])
