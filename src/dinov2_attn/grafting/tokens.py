"""Which token is which in a recording: probed once for a model, then known for any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dinov2_attn._compat import is_sharded
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.mosaics import KindOfImages
from dinov2_attn.backbone.probe import Probed, probe
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.channel import unedited, unrecorded
from dinov2_attn.grafting.interventions import added_tokens
from dinov2_attn.math.selection import resolve_names
from dinov2_attn.typing import Grid, Queries


@dataclass(frozen=True)
class _Known:
    """A layout of ``length`` tokens, and the size of the images for which it was probed.

    ``added`` of these tokens were added by ``add_registers``.
    """

    layout: Layout
    size: Grid
    length: int
    added: int

    def at(self, size: Grid, length: int | None) -> Layout | None:
        """Return the layout of ``length`` tokens of images of another ``size``, if they fit."""
        old = self.layout
        if size == self.size:
            return old if length in (None, self.length) else None
        rows, columns = old.grid
        if self.size[0] % rows or self.size[1] % columns:
            return None
        grid = (size[0] // (self.size[0] // rows), size[1] // (self.size[1] // columns))
        new = Layout(old.prefix, old.suffix, grid, old.per_cell, old.planes)
        return new if length in (None, new.length) else None


# The size of the images, the number of tokens, and how many of these were added.
_Key = tuple[Grid, int | None, int]

# The layouts that were probed, by attention module: a model may have several kinds.
_KNOWN: WeakKeyDictionary[nn.Module, list[_Known]] = WeakKeyDictionary()
_WITHOUT: WeakKeyDictionary[nn.Module, set[_Key]] = WeakKeyDictionary()


# The size of images that are not known.
_UNKNOWN: Grid = (-1, -1)

# So few tokens, once layers have mixed them, may move by chance as those of another grid.
_FEW = 16

# Rows and columns of patches that are enough for a probe of a model whose tokens are known to be
# the same at every size.
_CELLS = 12


class Tokens:
    """The tokens of one attention module in one pass.

    A model that is sharded over processes is not probed, because one of them alone would wait for
    the others. There, and where a probe finds nothing, a DINOv2's tokens are counted.

    Args:
        model: What takes the images.
        backbone: The DINOv2, if the model is or contains one.
        attention: The module whose tokens these are.
        length: The number of tokens N, or None if the pass has not run yet.
        images: The images of the pass, ``(B, C, H, W)``, or None if they are not known.
        sibling: The first module of the same kind in the model. It is probed where the tokens of
            ``attention`` itself are too mixed, or too few: they keep their places from layer to
            layer.
        prefix: The number of tokens before the patches, where it is known better.
        added: How many tokens ``add_registers`` added in the pass, None for as many as now.

    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone | None,
        attention: nn.Module,
        length: int | None,
        images: Tensor | None,
        sibling: nn.Module | None = None,
        prefix: int | None = None,
        added: int | None = None,
    ) -> None:
        self._whole, self._model = model, model if backbone is None else backbone.model
        self._backbone, self._attention, self._length = backbone, attention, length
        self._sibling, self._prefix = sibling, prefix
        self._size: Grid = _UNKNOWN if images is None else _size_of(images)
        self._added = added_tokens() if added is None else added
        self._kind = None
        if images is not None and not self.is_known:
            self._kind = KindOfImages.of(images)

    @property
    def is_known(self) -> bool:
        """Whether ``layout`` needs no probe."""
        known = self._size == _UNKNOWN or self._known() is not None
        return known or self._key in self._without

    def layout(self) -> Layout | None:
        """Return the layout, or None if there is no grid or it is not known."""
        if self._size == _UNKNOWN:
            return None
        found = self.probed() or self._counted()
        if found is None or self._prefix in (None, found.prefix):
            return found
        suffix = found.length - self._prefix - len(found.patches)
        return replace(found, prefix=self._prefix, suffix=suffix) if suffix >= 0 else None

    def probed(self) -> Layout | None:
        """Return the layout that a probe of the model finds, or None."""
        is_over = added_tokens() != self._added  # the block that added tokens
        if self.is_known or self._kind is None or is_over or is_sharded(self._model):
            return self._known()
        for kind, length in self._probes(self._kind):
            if (found := self._probed(kind, length)) is not None:
                size = int(kind.shape[-2]), int(kind.shape[-1])
                known = _Known(found, size, found.length, self._added)
                _KNOWN.setdefault(self._attention, []).append(known)
            if self._known() is not None:
                return self._known()
        self._without.add(self._key)
        return None

    def _probes(self, kind: KindOfImages) -> Iterator[tuple[KindOfImages, int | None]]:
        """Yield which images to probe, and how many tokens they must have if that is known.

        A DINOv2 has the same tokens at every size, so that smaller images say as much.
        """
        if self._backbone is not None:
            patch = self._backbone.patch_size
            sides = [min(n // p, _CELLS) * p for n, p in zip(self._size, patch, strict=True)]
            if tuple(sides) != self._size:
                yield replace(kind, shape=torch.Size([*kind.shape[:-2], *sides])), None
        yield kind, self._length

    def _probed(self, kind: KindOfImages, length: int | None) -> Layout | None:
        own = self._probed_at(self._attention, kind, length)
        if own is not None and own.layout is not None and own.layout.length > _FEW:
            return own.layout
        first = None if self._sibling is self._attention else self._sibling
        other = self._probed_at(first, kind, length)
        # Windows, rows and columns of equal lengths differ. A sequence of the whole image does not.
        if other is not None and (own is None or own.sequences == other.sequences == 1):
            return other.layout
        return None if own is None else own.layout

    def _probed_at(
        self, attention: nn.Module | None, kind: KindOfImages, length: int | None
    ) -> Probed | None:
        """Return what a probe of ``attention`` finds, if that is a layout of ``length`` tokens."""
        if attention is None:
            return None
        with unrecorded(), unedited():
            found = probe(self._model, attention, kind, around=self._whole)
        fits = found.layout is not None and length in (None, found.layout.length)
        return found if fits else None

    @property
    def _key(self) -> _Key:
        return self._size, self._length, self._added

    @property
    def _without(self) -> set[_Key]:
        return _WITHOUT.setdefault(self._attention, set())

    def _known(self) -> Layout | None:
        known = [one for one in _KNOWN.get(self._attention, []) if one.added == self._added]
        if self._backbone is None:  # another model may resize, turn or cut its images
            known = [one for one in known if one.size == self._size]
        fitting = (one.at(self._size, self._length) for one in known)
        return next((layout for layout in fitting if layout is not None), None)

    def _counted(self) -> Layout | None:
        if self._backbone is None:
            return None
        patch = self._backbone.patch_size
        grid = (self._size[0] // patch[0], self._size[1] // patch[1])
        own = self._backbone.prefix - added_tokens(self._model)
        layout = Layout(own + self._added, 0, grid)
        return layout if self._length in (None, layout.length) else None


def _size_of(images: Tensor) -> Grid:
    return int(images.shape[-2]), int(images.shape[-1])  # tensors in a trace


def named(queries: Queries, layout: Layout) -> Queries:
    """Return ``queries`` with ``"registers"`` and ``"patches"`` as positions.

    They hold for images of any size. Tokens behind the patches count as registers.

    Raises:
        InvalidInputError: If CLS is asked for, and the first token is a patch.

    """
    if isinstance(queries, str) and queries == "patches":
        return slice(layout.prefix, -layout.suffix or None)
    if isinstance(queries, str) and queries == "registers":
        return [*range(1, layout.prefix), *range(-layout.suffix, 0)]
    if isinstance(queries, str) and queries == "cls" and not layout.prefix:
        raise InvalidInputError(
            "a token before the patches, for CLS",
            f"patches from position 0 on, and {layout.suffix} tokens behind them",
            "Pass the position of the token that you mean, or slice(None) for all tokens.",
        )
    return resolve_names(queries, 0)
