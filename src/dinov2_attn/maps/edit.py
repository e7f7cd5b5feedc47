"""Changing the attention that a model uses, for the time of a ``with`` block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn._compat import raised_by_dynamo
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError, NotEditedError, OutOfRangeError
from dinov2_attn.grafting.channel import Editor, edited_in_a_graph, editing
from dinov2_attn.kernels.capture import heads_of
from dinov2_attn.kernels.edited import Part, Pattern, SomeRows
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.layers import Recorded, kind_of, recorded_in, some_of
from dinov2_attn.maps.recording import Recording
from dinov2_attn.maps.tokens import Tokens, named
from dinov2_attn.math.selection import positions, resolve_names, whole_number
from dinov2_attn.typing import (
    EditedHeads,
    HiddenKeys,
    Layer,
    Model,
    Queries,
    RecordedLayers,
)

# The first argument is a layer: an int in a DINOv2, a path in any other model.
Rewrite = Callable[[Any, Tensor], Tensor]


@dataclass
class Edit:
    """What ``edit`` yields: which layers it changes, and how often it did.

    Attributes:
        layers: The blocks, counted from 0, or the paths of attention modules.
        calls: The number of kernel calls that were changed, by layer.

    """

    layers: tuple[Layer, ...]
    calls: Counter[Layer] = field(default_factory=Counter)


@contextmanager
def edit(
    model: Model,
    layers: RecordedLayers = None,
    *,
    heads: EditedHeads | Mapping[Any, EditedHeads] | None = None,
    keys: HiddenKeys | ArtifactTokens = None,
    queries: Queries = None,
    weights: Rewrite | None = None,
    frozen: AttentionMaps | Recording | None = None,
) -> Iterator[Edit]:
    """Change the attention of every forward pass of this thread inside a ``with`` block.

    >>> with edit(model, heads={3: [0, 2]}):                        # ablate heads
    ...     output = model(images)
    >>> with edit(model, keys="registers", queries="cls"):          # hide keys from queries
    ...     output = model(images)
    >>> with edit(model, [11], weights=lambda layer, weights: weights.roll(1, 1)):
    ...     output = model(images)
    >>> with edit(model, frozen=maps):                              # the pattern of another image
    ...     output = model(images)

    Any model that ``record`` serves will do, without ``install``. One call makes one kind of
    change; blocks can be nested, and the inner one is given what the outer one made. ``record``
    sees the edited weights. Gradients flow. Layers that are not edited keep their kernel, and so
    do rows of a layer that are not: they are the same bit for bit, given the same input.

    - ``heads`` are ablated: their part of the kernel's output is zero, before the output
      projection. Their weights are zero.
    - ``keys`` are hidden from ``queries`` by the kernel's own mask, together with the mask or bias
      that the module gives it. Where explicit code makes the weights, those of the other keys grow
      in proportion, which is the same.
    - ``weights`` is a function that returns others. Only its layers, and of these only ``queries``,
      are computed explicitly.
    - ``frozen`` weights take the place of those of the layers and queries that they were recorded
      of.

    Args:
        model: Any module with attention inside.
        layers: The layers to edit, as for ``record``: ``None`` for all, an int for the last so
            many, or a sequence of numbers or paths.
        heads: Heads of ``layers``, an int or a sequence; or a mapping from layers to heads.
        keys: ``"cls"``, ``"registers"``, ``"patches"``, positions as for ``queries``; boolean
            ``(N,)`` or ``(B, N)``, true where a token is hidden; boolean ``(B, h, w)`` of patches;
            or ``ArtifactTokens``, whose mask it takes.
        queries: The rows to edit, ``None`` for all: as for ``record``.
        weights: Called with the layer and its weights ``(B, heads, Q, N)`` before dropout, in the
            dtype of the kernel. It returns as many, of this dtype. Rows need not sum to one.
        frozen: Maps of one batch with every head. One image serves batches of any size.

    Yields:
        An ``Edit``: the layers, and how often each was changed.

    Raises:
        InvalidInputError: If an argument does not fit, a row is left without any key, or a
            function returns another shape or dtype, NaN or infinity.
        OutOfRangeError: If there is no such layer, head or token.
        NotEditedError: At the end of the block, if a layer to edit did not run in it (an exported
            model, another thread). In the block, if ``torch.compile``, ``torch.export`` or
            ``torch.func`` would make another function of a pass.
        NotRecordedError: If an attention module calls no kernel that can be seen, or several.

    """
    change, modules = _change(model, layers, heads, keys, queries, weights, frozen)
    editor = _Editor(modules, change)
    try:
        with editing(editor, modules.wanted, modules.entrances):
            yield editor.report
    except Exception as error:
        # Dynamo wraps what is raised while it traces, and keeps only the words.
        if raised_by_dynamo(error) and NotEditedError.__name__ in str(error):
            raise edited_in_a_graph() from error
        raise
    editor.check()


# Names of tokens and masks of patches need the layout of the pass.
FindLayout = Callable[[], Layout]
Change = Callable[[Layer, Part, FindLayout], Part]


class _Editor(Editor):
    """Changes the patterns of some layers, and counts how often."""

    def __init__(self, modules: Recorded, change: Change) -> None:
        self._modules, self._change = modules, change
        self._images: dict[tuple[int, int], Tensor] = {}
        self._stopped = False
        self.report = Edit(tuple(dict.fromkeys(modules.wanted.values())))

    def begin(self, images: Tensor) -> None:
        """Keep one image of each size: a probe may need it."""
        self._images[(images.shape[-2], images.shape[-1])] = images[:1].detach()

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is that of a layer to edit."""
        return attention in self._modules.wanted

    def edit(self, attention: nn.Module, pattern: Pattern) -> Pattern:
        """Return the changed pattern."""
        layer = self._modules.wanted[attention]
        self.report.calls[layer] += 1
        return pattern.each(
            lambda part: self._change(layer, part, lambda: self._layout(attention, part))
        )

    def stopped(self) -> None:
        """Note that a pass is ended before its last layer."""
        self._stopped = True

    def check(self) -> None:
        """Raise ``NotEditedError`` if a layer to edit did not run."""
        ran = set(self.report.calls)
        missing = [layer for layer in self.report.layers if layer not in ran]
        if ran and not self._modules.is_chosen:
            kinds = set(map(kind_of, ran))
            missing = [layer for layer in missing if kind_of(layer) in kinds]
        if not missing or (ran and self._stopped):
            return
        raise NotEditedError(
            "each layer to edit to run its forward inside edit(...)",
            f"{'no pass' if not ran else 'none'} of {some_of(missing)}",
            "Run the model inside the block, in the same thread, as an eager module (no exported, "
            "scripted or replicated one). If a pass runs some layers only, name these: "
            "layers=[...]. A kernel that is called from outside of their forward cannot be edited.",
        )

    def _layout(self, attention: nn.Module, part: Part) -> Layout:
        """Return where the patches are among the tokens of ``part``."""
        modules = self._modules
        kind = kind_of(modules.wanted[attention])
        sibling = next(m for m, layer in modules.all.items() if kind_of(layer) == kind)
        for images in reversed(self._images.values()):
            tokens = Tokens(
                modules.whole, modules.backbone, attention, part.columns, images, sibling
            )
            layout = tokens.layout()
            if layout is not None and layout.length == part.columns:
                return layout
        if modules.backbone is not None and part.columns >= modules.backbone.prefix:
            prefix = modules.backbone.prefix  # counted, for tokens that came from no images
            return Layout(prefix, 0, (1, part.columns - prefix))
        raise InvalidInputError(
            "a model whose token layout is known, for the names of tokens and masks of patches",
            f"no patch grid among {part.columns} tokens of {name_of(type(modules.whole))}",
            "Pass positions, or a boolean mask (B, N) of the tokens.",
        )


def _change(
    model: object,
    layers: RecordedLayers,
    heads: Any,
    keys: Any,
    queries: Queries,
    weights: Any,
    frozen: Any,
) -> tuple[Change, Recorded]:
    """Return the one change that the arguments of ``edit`` ask for, and where to make it."""
    options = {"heads": heads, "keys": keys, "weights": weights, "frozen": frozen}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise InvalidInputError(
            "one of heads=, keys=, weights= and frozen=",
            " and ".join(given) or "none of them",
            "Say what to change. Nest blocks for more: "
            "with edit(model, heads=...), edit(model, keys=...): ...",
        )
    if queries is not None and given[0] in ("heads", "frozen"):
        raise InvalidInputError(
            f"queries= with keys= or weights=, as {given[0]}= has its own rows",
            f"queries={queries!r} with {given[0]}=",
            "Leave queries out. To change some rows of a head: weights=lambda layer, weights: ...",
        )
    if isinstance(queries, str):
        resolve_names(queries, 0)  # an unknown word is an error at once
    if heads is not None:
        return _ablation(model, layers, heads)
    if frozen is not None:
        return _freezing(model, layers, frozen)
    modules = recorded_in(model, layers)
    if keys is not None:
        return _Hiding(_checked_keys(keys), queries), modules
    if not callable(weights):
        raise InvalidInputError(
            "weights to be a function of a layer and its weights",
            f"{type(weights).__name__}",
            "Pass, for instance, lambda layer, weights: weights.roll(1, dims=1). Weights that are "
            "known before: frozen=maps.",
        )
    return _Rewriting(weights, queries), modules


def _ablation(model: object, layers: RecordedLayers, heads: Any) -> tuple[Change, Recorded]:
    if not isinstance(heads, Mapping):
        modules = recorded_in(model, layers)
        chosen: dict[Layer, Any] = dict.fromkeys(modules.wanted.values(), heads)
    else:
        if layers is not None:
            raise InvalidInputError(
                "layers once: in layers= or as the keys of heads=",
                f"layers={layers!r} and heads={dict(heads)!r}",
                "Leave layers out, or pass the heads alone: heads=[...].",
            )
        modules = _of_layers(model, list(heads))
        known = list(dict.fromkeys(modules.all.values()))
        chosen = {}
        for layer, own in heads.items():
            name = layer if isinstance(layer, str) else known[whole_number(layer, "layers")]
            chosen[name] = [*chosen.get(name, ()), *_as_list(own)]
    ablated = {layer: _as_list(own) for layer, own in chosen.items()}
    for module, layer in modules.wanted.items():
        if (count := heads_of(module)) is not None:
            _checked_heads(ablated[layer], count, layer)
    return _Ablation(ablated), modules


def _of_layers(model: object, layers: list[Any]) -> Recorded:
    """Return the modules of ``layers``, of which there may be none."""
    modules = recorded_in(model, layers or None)
    return modules if layers else replace_wanted(modules, {})


def replace_wanted(modules: Recorded, wanted: dict[nn.Module, Layer]) -> Recorded:
    """Return ``modules`` with others to edit."""
    others = {module: layer for module, layer in modules.all.items() if module not in wanted}
    return Recorded(
        modules.all,
        wanted,
        others,
        modules.backbone,
        modules.entrances,
        modules.whole,
        modules.is_chosen,
    )


def _as_list(heads: Any) -> list[int]:
    if hasattr(heads, "tolist"):  # a tensor or an array
        heads = heads.tolist()
    several = isinstance(heads, Sequence) and not isinstance(heads, str)
    return [whole_number(head, "heads") for head in (heads if several else [heads])]


def _checked_heads(heads: list[int], count: int, layer: Layer) -> list[int]:
    if wrong := [head for head in heads if not -count <= head < count]:
        raise OutOfRangeError(
            f"heads between {-count} and {count - 1} of layer {layer}, there being {count}",
            ", ".join(map(str, wrong)),
            "Heads count from 0.",
        )
    return [head % count for head in heads]


@dataclass(frozen=True)
class _Ablation:
    """Ablates ``heads`` of each layer."""

    heads: Mapping[Layer, list[int]]

    def __call__(self, layer: Layer, part: Part, find: FindLayout) -> Part:
        del find
        heads = _checked_heads(self.heads[layer], part.heads, layer)
        return part.zero(heads) if heads else part


@dataclass(frozen=True)
class _Hiding:
    """Hides ``keys`` from ``queries``."""

    keys: Any
    queries: Queries

    def __call__(self, layer: Layer, part: Part, find: FindLayout) -> Part:
        rows = _rows(self.queries, part, find)
        keys = self._mask(layer, part, find)
        if not keys.any() or rows == ():
            return part
        return part.hide(rows, keys)

    def _mask(self, layer: Layer, part: Part, find: FindLayout) -> Tensor:
        """Return the keys to hide as boolean ``(B, N)`` or ``(1, N)``."""
        if not isinstance(self.keys, Tensor):
            chosen = positions(_named(self.keys, find), part.columns)
            mask = torch.zeros(1, part.columns, dtype=torch.bool)
            mask[:, list(chosen)] = True
            return mask
        mask = self.keys
        if mask.ndim == 3:
            mask = _of_patches(mask, find())
        mask = mask if mask.ndim == 2 else mask[None]
        if mask.shape[1] != part.columns or len(mask) not in (1, part.batch):
            raise InvalidInputError(
                f"keys (N,), (B, N) or (B, h, w) for {part.batch} images of {part.columns} tokens "
                f"at layer {layer}",
                f"a mask {tuple(self.keys.shape)}",
                "Make the mask for this batch. Tokens are CLS, registers, patches row by row.",
            )
        return mask


def _of_patches(mask: Tensor, layout: Layout) -> Tensor:
    """Return a mask ``(B, h, w)`` of patches as one ``(B, N)`` of tokens, if it fits."""
    if layout.grid[0] == 1 and mask.shape[1] * mask.shape[2] == layout.grid[1]:
        mask = mask.reshape(len(mask), *layout.grid)  # the grid was counted, not found
    if tuple(mask.shape[1:]) != layout.grid:
        return mask.flatten(1)  # of no fitting length, which is said with the layer
    flat = mask.flatten(1)
    flat = (
        flat.repeat(1, layout.per_cell)
        if layout.planes
        else flat.repeat_interleave(layout.per_cell, 1)
    )
    return torch.nn.functional.pad(flat, (layout.prefix, layout.suffix))


def _checked_keys(keys: Any) -> Any:
    """Return a boolean mask as a tensor, anything else as it is."""
    keys = keys.mask if isinstance(keys, ArtifactTokens) else keys
    if isinstance(keys, str):
        resolve_names(keys, 0)  # an unknown word is an error at once
        return keys
    if not hasattr(keys, "tolist") or "bool" not in str(getattr(keys, "dtype", "")):
        return keys
    mask = torch.as_tensor(keys)
    if not 1 <= mask.ndim <= 3:
        raise InvalidInputError(
            "keys as a boolean mask (N,), (B, N) or (B, h, w)",
            f"one of shape {tuple(mask.shape)}",
            "Pass one of these, or positions.",
        )
    return mask


@dataclass(frozen=True)
class _Rewriting:
    """Has a function make the weights of ``queries``."""

    function: Rewrite
    queries: Queries

    def __call__(self, layer: Layer, part: Part, find: FindLayout) -> Part:
        rows = _rows(self.queries, part, find)
        if rows == ():
            return part
        given = part.weights_of(rows)
        made = self.function(layer, given)
        self._check(layer, given, made)
        return part.with_weights(rows, made)

    def _check(self, layer: Layer, given: Tensor, made: object) -> None:
        if (
            not isinstance(made, Tensor)
            or (made.shape, made.dtype) != (given.shape, given.dtype)
            or made.device != given.device
        ):
            found = (
                f"{made.dtype} {tuple(made.shape)} on {made.device}"
                if isinstance(made, Tensor)
                else type(made).__name__
            )
            raise InvalidInputError(
                f"weights=... to return {given.dtype} {tuple(given.shape)} on {given.device}, as "
                f"it was given, at layer {layer}",
                found,
                "Return a tensor of the same shape, dtype and device: made.to(weights).",
            )
        _check_finite(made, f"the weights that weights=... returned at layer {layer}")


def _check_finite(weights: Tensor, what: str) -> None:
    if not bool(weights.isfinite().all()):
        raise InvalidInputError(
            "finite weights",
            f"NaN or infinity in {what}",
            "Look for a division by zero: a row whose weights are all zero has no sum to divide "
            "by. To hide keys, use keys=.",
        )


def _freezing(model: object, layers: RecordedLayers, frozen: Any) -> tuple[Change, Recorded]:
    maps = frozen
    if isinstance(maps, Recording):
        maps = maps.passes[0] if len(maps.passes) == 1 else maps
    if not isinstance(maps, AttentionMaps) or not all(map(_is_whole, maps.weights)):
        raise InvalidInputError(
            "frozen to be AttentionMaps of one batch, as tensors (B, heads, Q, N) of each layer",
            repr(frozen) if isinstance(frozen, AttentionMaps | Recording) else str(type(frozen)),
            "Pass what attention_maps(model, images) returns, or one entry of a recording: "
            "recording.passes[0]. Record every head.",
        )
    known = dict(zip(maps.layers, maps.weights, strict=True))
    modules = recorded_in(model, list(maps.layers))
    if layers is not None:
        chosen = set(recorded_in(model, layers).wanted.values())
        if missing := [layer for layer in chosen if layer not in known]:
            raise OutOfRangeError(
                f"layers of the frozen maps: {some_of(maps.layers)}",
                some_of(missing),
                "Leave layers out for all that the maps have.",
            )
        modules = replace_wanted(modules, {m: i for m, i in modules.all.items() if i in chosen})
    for layer, weights in known.items():
        _check_finite(weights, f"the frozen maps of layer {layer}")
    return _Freezing(known, maps.queries), modules


def _is_whole(weights: object) -> bool:
    return isinstance(weights, Tensor) and weights.ndim == 4 and weights.is_floating_point()


@dataclass(frozen=True)
class _Freezing:
    """Puts weights of another pass in the place of those of its ``queries``."""

    weights: Mapping[Layer, Tensor]
    queries: tuple[int, ...] | None

    def __call__(self, layer: Layer, part: Part, find: FindLayout) -> Part:
        del find
        frozen = self.weights[layer]
        batch, heads, rows, columns = frozen.shape
        lines = part.rows if self.queries is None else len(self.queries)
        if (
            batch not in (1, part.batch)
            or (heads, rows, columns) != (part.heads, lines, part.columns)
            or max(self.queries or (0,)) >= part.rows
        ):
            raise InvalidInputError(
                f"a frozen pattern ({part.batch} or 1, {part.heads}, {lines}, {part.columns}) for "
                f"{part.rows} tokens at layer {layer}",
                f"{tuple(frozen.shape)}",
                "Record images of the same size, one or as many as in the batch, with every head.",
            )
        own = frozen.to(part.device, part.dtype).expand(part.batch, -1, -1, -1)
        rows_of = self.queries
        return part if rows_of == () else part.with_weights(_in_order(rows_of, part.rows), own)


def _in_order(rows: SomeRows, length: int) -> SomeRows:
    return None if rows == tuple(range(length)) else rows


def _rows(queries: Queries, part: Part, find: FindLayout) -> SomeRows:
    """Return the positions of the rows to edit, each once, or None for all."""
    if queries is None:
        return None
    found = tuple(dict.fromkeys(positions(_named(queries, find), part.rows)))
    return _in_order(found, part.rows)


def _named(tokens: Any, find: FindLayout) -> Any:
    if isinstance(tokens, str) and tokens != "cls":
        return named(tokens, find())
    return tokens
