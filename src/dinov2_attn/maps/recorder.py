"""Assembling what attention modules give in forward passes to recorded passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.grafting.channel import prove_once
from dinov2_attn.grafting.interventions import added_tokens
from dinov2_attn.grafting.tokens import Tokens, named
from dinov2_attn.kernels.call import KernelCall, Proof, verify
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.copies import Copies
from dinov2_attn.maps.facets import of_layers
from dinov2_attn.maps.gradients import Gradients, Slot, check_differentiable, watch
from dinov2_attn.maps.layers import Course, Recorded, advice, kind_of, some_of
from dinov2_attn.maps.measuring import measure_parts
from dinov2_attn.maps.recording import Recording
from dinov2_attn.maps.result import W
from dinov2_attn.math.attention import check_heads
from dinov2_attn.math.buffers import NewResult, new_result
from dinov2_attn.math.selection import positions, resolve_names
from dinov2_attn.typing import Facet, Grid, Heads, Layer, Queries, Source, Statistic

# The first argument is a layer: an int in a DINOv2, a path in any other model.
Reduce = Callable[[Any, Tensor], W]
Check = Literal["first", "every"] | Literal[False]

# The sizes of images for which models ran their layers once in a pass. The next pass of that size
# may end with the last of them. Other sizes may be cut into tiles.
_RAN_ONCE: WeakKeyDictionary[nn.Module, set[tuple[int, ...]]] = WeakKeyDictionary()

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_AT_KERNEL: tuple[Source, ...] = ("kernel",)


@dataclass(frozen=True)
class Asked:
    """What is asked of each layer, as ``record`` explains it."""

    queries: Queries = None
    heads: Heads = None
    reduce: Reduce[Any] | None = None
    gradients: bool = False
    facets: tuple[Facet, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    check: Check = "first"
    grid: Grid | None = None
    prefix: int | None = None

    def __post_init__(self) -> None:
        check_heads(self.heads)
        _check_options(self.reduce, self.check)
        _check_layout(self.grid, self.prefix)
        _check_dtype(self.dtype)

    def rows(self) -> Queries:
        """Return the rows, as positions where the layout of the tokens was said."""
        queries, grid, prefix = self.queries, self.grid, self.prefix
        if prefix is not None and grid is not None and queries == "patches":
            return slice(prefix, prefix + math.prod(grid))
        if prefix is not None:
            return resolve_names(queries, prefix - 1)
        if isinstance(queries, str):
            resolve_names(queries, 0)  # an unknown word is an error at once
        return queries


class _Batch(NamedTuple):
    """The weights of a layer for one batch, or what ``reduce`` made of them."""

    kept: Any
    columns: int
    rows: int
    slot: Slot | None
    facets: dict[str, Tensor]
    measured: dict[Statistic, Tensor]


class Recorder:
    """Assembles layers to passes: one begins with its images and ends with its last layer.

    Args:
        modules: The layers.
        asked: What to keep of them.
        may_stop: Whether a pass may end with the last layer.

    """

    def __init__(self, modules: Recorded, asked: Asked, *, may_stop: bool = False) -> None:
        self.modules, self._asked, self._may_stop = modules, asked, may_stop
        self._queries = asked.rows()
        backbone = self.modules.backbone
        self._own_prefix = backbone.prefix - added_tokens(backbone.model) if backbone else 0
        self._added = 0  # to the tokens of the current pass, by a block that may end before it
        self._course = Course()
        self._images: list[Tensor] = []
        self._entered: set[nn.Module] = set()
        self._rows: dict[str, Queries] = {}  # of each kind of attention
        self._kept: dict[Layer, list[_Batch]] = {}
        self._last: Layer | None = None
        self._whole, self._broken, self._seen = 0, 0, 0
        # Of the current pass: whether its images were seen, and each layer came in its turn.
        self._begun, self._clean = False, True
        self.recording: Recording[Any] = Recording()
        self._size: tuple[int, ...] | None = None  # of the images, without their batch
        self._proofs: list[Proof] = []
        self._new: NewResult = partial(new_result, dtype=asked.dtype)
        self._copies = Copies(asked.device)

    @property
    def stops(self) -> bool:
        """Whether the next layer is the last one that is needed."""
        if not self._may_stop or len(self._kept) + 1 != self.modules.count:
            return False
        return self.modules.is_backbone or self._size in _RAN_ONCE.get(self.modules.whole, ())

    def begin(self, entrance: nn.Module, images: Tensor) -> None:
        """Note the ``images`` of a pass; batches of a list come one by one."""
        if not self.modules.takes_images(entrance):
            return
        if self._size is None or entrance is self.modules.whole:
            self._size = tuple(map(int, images.shape[1:]))
        if entrance in self.modules.entrances:
            self._seen += 1
        if self.modules.backbone is None:
            if entrance is not self.modules.whole and entrance in self._entered and self._kept:
                self._end_or_break_off()  # its layers ran, and another pass begins
            self._entered.add(entrance)
            if entrance is self.modules.whole or not self._images:
                self._images = [images]
        elif entrance in self.modules.entrances:
            self._end_pass()
            self._begun = True
            self._images.append(images)
        elif not self._kept:
            self._images = []  # what was embedded before, by itself, is not of this pass

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is that of a layer to record."""
        if attention in self.modules.others:
            self._course.ran(self.modules.others[attention])
        return attention in self.modules.wanted

    def take(self, attention: nn.Module, call: KernelCall) -> None:
        """Keep the weights of a layer, or what ``reduce`` makes of them."""
        layer = self.modules.wanted[attention]
        self._prove(attention, layer, call)
        self._course.ran(layer)
        if layer in self._kept and not self._runs_again_for_a_list(layer):
            self._end_or_break_off()
        self._added = added_tokens()
        if kind_of(layer) not in self._rows:
            self._rows[kind_of(layer)] = self._rows_of(attention, call)
        with torch.no_grad() if self._asked.gradients else nullcontext():
            self._kept.setdefault(layer, []).extend(self._batches(layer, call))
        self._last = layer
        if self.modules.is_chosen and self._is_whole():
            self._end_layers()

    def left(self, module: nn.Module) -> None:
        """End the pass of a model whose layers are those that ran."""
        if module is self.modules.whole:
            self._seen += 1
            if self._kept and not self.modules.is_chosen:
                self._end_layers()

    def failed(self, module: nn.Module) -> None:
        """Break a pass off that an exception ended."""
        if module is self.modules.whole and (self._kept or self._images):
            self._break_off()

    def check(self) -> None:
        """Raise ``NotRecordedError`` unless there were passes, and each with all of its layers."""
        self._end_pass()
        self._verify()
        if self._broken or not self._whole:
            raise self._not_recorded()
        if missing := self._siblings_that_never_ran():
            raise NotRecordedError(
                f"every layer like {kind_of(missing[0])} to run its forward",
                f"{len(missing)} that did not: {', '.join(missing[:3])}",
                "Their kernel may be called from outside of their forward, where it cannot be "
                "seen. Name the layers that do run: layers=[...].",
            )

    def _prove(self, attention: nn.Module, layer: Layer, call: KernelCall) -> None:
        if not self._asked.check:
            return
        proved = prove_once(attention, call, f"layer {layer}")
        if self._asked.check == "every" and not proved:
            self._proofs += call.proofs(f"layer {layer}", one_head=True)

    def _verify(self) -> None:
        """Read the proofs of a pass, for which the device is waited for once."""
        proofs, self._proofs = self._proofs, []
        verify(proofs)

    def _runs_again_for_a_list(self, layer: Layer) -> bool:
        """Return whether ``layer`` may run for the next batch of a list, before other layers."""
        counts = {len(kept) for other, kept in self._kept.items() if other != layer}
        return layer == self._last and all(len(self._kept[layer]) < count for count in counts)

    def _batches(self, layer: Layer, call: KernelCall) -> Iterator[_Batch]:
        """Yield what is kept of each batch of a ``call``."""
        reduce = None if self._asked.reduce is None else partial(self._asked.reduce, layer)
        own, queries = call, self._rows[kind_of(layer)]
        if self._asked.gradients:
            check_differentiable(call, layer)
            own = call.detached()
        weights = own.weights(queries, self._asked.heads, self._new)
        each = weights if isinstance(weights, list) else [weights]
        if self._asked.dtype is not None:
            each = [one.to(self._asked.dtype) for one in each]
        slots: list[Slot | None] = [None] * len(each)
        if call.place is not None and self._asked.gradients:
            keep = partial(self._kept_gradient, reduce)
            slots = [*watch(call.place, own, len(each), queries, self._asked.heads, keep)]
        names, measured = self._asked.facets, self._measured(layer, call, len(each))
        found = own.facets(names) if names else [{} for _ in each]
        for one, slot, own_facets, numbers in zip(each, slots, found, measured, strict=True):
            rows = one.shape[-1] if isinstance(weights, list) else call.rows
            kept = one if reduce is None else reduce(one)
            sizes = (int(one.shape[-1]), int(rows))  # tensors in a trace
            kept = self._copies.begin(kept, may_change=reduce is not None)
            beside = map(self._copies.begin, (own_facets, numbers))
            yield _Batch(kept, *sizes, slot, *beside)

    def _kept_gradient(self, reduce: Callable[[Tensor], Any] | None, gradient: Tensor) -> Any:
        return self._copies.whole(gradient if reduce is None else reduce(gradient))

    def _measured(
        self, layer: Layer, call: KernelCall, batches: int
    ) -> list[dict[Statistic, Tensor]]:
        """Return the statistics of each of the ``batches`` of a ``call``."""
        names = self._asked.statistics
        if not names:
            return [{}] * batches
        attention = next(m for m, name in self.modules.wanted.items() if name == layer)
        first = len(self._kept.get(layer, []))
        layouts = [partial(self._layout_of, attention, first + i, batches) for i in range(batches)]
        return measure_parts(call.detached().parts, names, layouts, self._asked.heads)

    def _layout_of(
        self, attention: nn.Module, number: int, several: int, columns: int
    ) -> Layout | None:
        """Return where the patches of batch ``number`` are, one of ``several`` in a call."""
        prefix, grid = self._prefix_or_counted, self._asked.grid
        if grid is not None and prefix + math.prod(grid) <= columns:
            return Layout(prefix, columns - prefix - math.prod(grid), grid)
        # A model may embed images without running its layers. A call takes the last ones.
        images = self._images[-several:] if several > 1 else self._images
        near = images[number : number + 1] or images[-1:]
        for one in [*near, *(other for other in images if other is not near[0])]:
            layout = self._tokens(attention, one, columns).layout()
            if layout is not None:
                return layout
        return None

    def _end_or_break_off(self) -> None:
        if self.modules.is_chosen:
            self._break_off()
        else:
            self._end_layers()

    def _is_whole(self) -> bool:
        if len(self._kept) < self.modules.count:
            return False
        return len({len(kept) for kept in self._kept.values()}) == 1

    def _end_layers(self) -> None:
        """Append what was kept to the recording: an entry for each batch, and each kind in it."""
        self._verify()
        self._copies.end()
        count = max(map(len, self._kept.values()))
        # A model may embed images without running its layers. The last images belong to this pass.
        for i, images in enumerate(([None] * count + self._images)[-count:]):
            kinds: dict[tuple[str, int, int], dict[Layer, _Batch]] = {}
            for layer in filter(self._kept.__contains__, self.modules.wanted.values()):
                batches = self._kept[layer]
                if i < len(batches):
                    one = batches[i]
                    key = (kind_of(layer), one.columns, one.rows)
                    kinds.setdefault(key, {})[layer] = one
            for (_, columns, rows), found in kinds.items():
                self._append(found, images, columns, rows)
        self._whole += 1
        self._images, self._kept, self._last = [], {}, None
        self._entered = set()
        if self._clean and not self._begun:
            self._course.end(whole=True)

    def _append(
        self, found: dict[Layer, _Batch], images: Tensor | None, columns: int, rows: int
    ) -> None:
        """Append the maps of one batch and one kind of attention to the recording."""
        prefix, grid, first = self._prefix_or_counted, self._asked.grid, next(iter(found))
        fits = grid is not None and prefix + math.prod(grid) <= columns
        maps: AttentionMaps[Any] = AttentionMaps(
            tuple(batch.kept for batch in found.values()),
            tuple(found.keys()),
            grid if fits else None,
            prefix,
            positions(self._rows[kind_of(first)], rows),
            columns - prefix - math.prod(grid) if grid is not None and fits else 0,
            sources=_AT_KERNEL * len(found),
            facets=self._facets_of(found),
            _later=_gradients(found),
            _measured=self._measured_of(found),
        )
        attention = next(m for m, layer in self.modules.wanted.items() if layer == first)
        self.recording.add(maps, None if fits else self._tokens(attention, images, columns))

    def _facets_of(self, found: dict[Layer, _Batch]) -> dict[Facet, tuple[Any, ...]]:
        names = self._asked.facets
        return of_layers([batch.facets for batch in found.values()], names) if names else {}

    def _measured_of(self, found: dict[Layer, _Batch]) -> dict[Statistic, tuple[Tensor, ...]]:
        each = [batch.measured for batch in found.values()]
        return {name: tuple(one[name] for one in each) for name in self._asked.statistics}

    def _tokens(self, attention: nn.Module, images: Tensor | None, columns: int) -> Tokens:
        modules = self.modules
        kind = kind_of(modules.wanted[attention])
        sibling = next(m for m, layer in modules.all.items() if kind_of(layer) == kind)
        known = (images, sibling, self._asked.prefix, self._added)
        return Tokens(modules.whole, modules.backbone, attention, columns, *known)

    @property
    def _prefix_or_counted(self) -> int:
        own = self._own_prefix + self._added if self.modules.backbone else 0
        return own if self._asked.prefix is None else self._asked.prefix

    def _rows_of(self, attention: nn.Module, call: KernelCall) -> Queries:
        """Return the positions that the names of rows mean, for attention of this kind."""
        backbone, queries = self.modules.backbone, self._queries
        if not isinstance(queries, str) or (queries == "cls" and backbone is not None):
            return queries
        images = self._images[-1] if self._images else None
        layout = self._tokens(attention, images, call.rows).layout()
        if layout is not None:
            return named(queries, layout)
        if backbone is not None:
            return resolve_names(queries, backbone.registers)
        if queries == "cls":
            return 0  # of a sequence without images
        raise InvalidInputError(
            f"queries={queries!r} of a model whose token layout is known",
            "a model in which no patch grid was found",
            "Pass positions, or say prefix= too.",
        )

    def _end_pass(self) -> None:
        if self._kept and not self.modules.is_chosen:
            self._end_layers()
        whole = self._clean and not self._kept and self._whole > 0
        if self._kept:
            self._break_off()
        self._course.end(whole=whole)
        self._begun, self._clean = False, True

    def _break_off(self) -> None:
        self._copies.end()
        self._broken += 1
        self._clean = False
        self._images, self._kept, self._last = [], {}, None
        self._entered = set()

    def note_ran_once(self) -> None:
        """Note that this pass of the model ran its layers once."""
        if self.modules.is_chosen and len(self.recording) == 1 and self._size is not None:
            _RAN_ONCE.setdefault(self.modules.whole, set()).add(self._size)

    def _not_recorded(self) -> NotRecordedError:
        layers = list(dict.fromkeys(self.modules.wanted.values()))
        calls = self._course.calls(layers)
        if self._seen and not (calls or self._whole or self._broken):
            return NotRecordedError(
                f"the forward of each attention module to run in a pass: {some_of(layers)}",
                f"a pass of {name_of(type(self.modules.whole))} in which none ran",
                "Their kernel is called from outside of their forward, where it cannot be seen: "
                "by the model itself, by forward_list in training, or in a compiled graph. Try "
                "model.eval(), or an eager model.",
            )
        return NotRecordedError(
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

    def _siblings_that_never_ran(self) -> list[str]:
        """Return the layers that no pass ran, although others of their kind ran."""
        if self.modules.is_chosen:
            return []
        ran = {layer for maps in self.recording.passes for layer in maps.layers}
        kinds = {kind_of(layer) for layer in ran}
        wanted = self.modules.wanted.values()
        return [str(layer) for layer in wanted if layer not in ran and kind_of(layer) in kinds]


def _gradients(found: dict[Layer, _Batch]) -> Gradients | None:
    slots = {layer: batch.slot for layer, batch in found.items() if batch.slot is not None}
    return Gradients(slots) if slots else None


def _check_options(reduce: object, check: object) -> None:
    if not (reduce is None or callable(reduce)):
        raise InvalidInputError(
            "reduce to be None or a function of a layer's number and its weights",
            f"{type(reduce).__name__}",
            "Pass, for instance, lambda layer, weights: weights.mean(1).cpu().",
        )
    if check not in ("first", "every", False):
        raise InvalidInputError(
            'check="first", check="every" or check=False',
            f"check={check!r}",
            'Leave it out to prove each layer in its first pass, or say "every".',
        )


def _check_dtype(dtype: object) -> None:
    if not (dtype is None or dtype in _DTYPES):
        raise InvalidInputError(
            f"dtype as one of {', '.join(map(str, _DTYPES))}",
            repr(dtype),
            "Leave it out for that of the kernel, or pass torch.float16.",
        )


def _check_layout(grid: object, prefix: object) -> None:
    if not (prefix is None or (isinstance(prefix, int) and prefix >= 0)):
        raise InvalidInputError(
            "prefix as the number of tokens before the patches",
            repr(prefix),
            "Count CLS and the registers: prefix=5 for four registers.",
        )
    sides = list(grid) if isinstance(grid, tuple | list) else []
    whole = all(isinstance(side, int) and side > 0 for side in sides)
    if grid is not None and not (whole and len(sides) == 2):
        raise InvalidInputError(
            "grid as height and width of the patch grid", repr(grid), "Pass a pair: grid=(16, 16)."
        )
