"""The changes that ``edit`` makes to the pattern of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.grafting.tokens import named
from dinov2_attn.kernels.capture import heads_of
from dinov2_attn.kernels.edited import Part, SomeRows
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.layers import Recorded, recorded_in, some_of
from dinov2_attn.maps.recording import Recording
from dinov2_attn.math.selection import positions, resolve_names, whole_number
from dinov2_attn.typing import Layer, Queries, QueryWord, RecordedLayers

# The first argument is a layer: an int in a DINOv2, a path in any other model.
Rewrite = Callable[[Any, Tensor], Tensor]

# Names of tokens and masks of patches need the layout of the pass.
FindLayout = Callable[[], Layout]
Change = Callable[[Layer, Part, FindLayout], Part]


def ablation(model: object, layers: RecordedLayers, heads: Any) -> tuple[Change, Recorded]:
    """Return the change that ablates ``heads``, and the modules in which it does.

    Raises:
        InvalidInputError: If layers or heads are no such thing.
        OutOfRangeError: If there is no such layer or head.

    """
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
    return modules if layers else replace(modules, wanted={})


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
class Hiding:
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
            keys = torch.zeros(1, part.columns, dtype=torch.bool)
            keys[:, list(chosen)] = True
            return keys
        mask: Tensor | None = _of_patches(self.keys, find()) if self.keys.ndim == 3 else self.keys
        mask = mask[None] if mask is not None and mask.ndim == 1 else mask
        if mask is None or mask.shape[1] != part.columns or len(mask) not in (1, part.batch):
            raise InvalidInputError(
                f"keys (N,), (B, N) or (B, h, w) for {part.batch} images of {part.columns} tokens "
                f"at layer {layer}",
                f"a mask {tuple(self.keys.shape)}",
                "Make the mask for this batch. Tokens are CLS, registers, patches row by row.",
            )
        return mask


def _of_patches(mask: Tensor, layout: Layout) -> Tensor | None:
    """Return a mask ``(B, h, w)`` of patches as one ``(B, N)`` of tokens, None if it is no fit."""
    height, width = mask.shape[1:]
    # One row of patches may be a grid that was counted, not found.
    if layout.grid not in ((height, width), (1, height * width)):
        return None
    flat = mask.flatten(1)
    if layout.planes:
        flat = flat.repeat(1, layout.per_cell)
    else:
        flat = flat.repeat_interleave(layout.per_cell, 1)
    return F.pad(flat, (layout.prefix, layout.suffix))


def checked_keys(keys: Any) -> Any:
    """Return a boolean mask as a tensor, positions of a tensor or an array as plain ones."""
    keys = keys.mask if isinstance(keys, ArtifactTokens) else keys
    if isinstance(keys, str):
        resolve_names(cast("QueryWord", keys), 0)  # an unknown word is an error at once
        return keys
    if not hasattr(keys, "tolist"):
        return keys
    if "bool" not in str(getattr(keys, "dtype", "")):
        return keys.tolist()
    mask = torch.as_tensor(keys)
    if not 1 <= mask.ndim <= 3:
        raise InvalidInputError(
            "keys as a boolean mask (N,), (B, N) or (B, h, w)",
            f"one of shape {tuple(mask.shape)}",
            "Pass one of these, or positions.",
        )
    return mask


@dataclass(frozen=True)
class Rewriting:
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


def freezing(model: object, layers: RecordedLayers, frozen: Any) -> tuple[Change, Recorded]:
    """Return the change that puts in ``frozen`` maps, and the modules in which it does.

    Raises:
        InvalidInputError: If ``frozen`` is no maps of one batch with every head, or not finite.
        OutOfRangeError: If there is no such layer.

    """
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
        wanted = {module: layer for module, layer in modules.all.items() if layer in chosen}
        modules = replace(modules, wanted=wanted)
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
    """Return the positions that a name means, anything else as it is."""
    is_name = isinstance(tokens, str) and tokens != "cls"
    return named(cast("QueryWord", tokens), find()) if is_name else tokens
