"""Changing the attention that a model uses, for the time of a ``with`` block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dinov2_attn._compat import raised_by_dynamo
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError, NotEditedError
from dinov2_attn.grafting.channel import Editor, edited_in_a_graph, editing
from dinov2_attn.grafting.tokens import Tokens
from dinov2_attn.kernels.capture import heads_of
from dinov2_attn.kernels.edited import EditedProduct, Part, Pattern
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.changes import (
    Change,
    Hiding,
    Rewrite,
    Rewriting,
    ablation,
    checked_keys,
    freezing,
)
from dinov2_attn.maps.layers import Recorded, kind_of, recorded_in, some_of
from dinov2_attn.maps.recording import Recording
from dinov2_attn.math.selection import resolve_names
from dinov2_attn.typing import EditedHeads, HiddenKeys, Layer, Model, Queries, RecordedLayers


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


class _Editor(Editor):
    """Changes the patterns of some layers, and counts how often."""

    def __init__(self, modules: Recorded, change: Change) -> None:
        self._recorded, self._change = modules, change
        self._images: dict[tuple[int, int], Tensor] = {}
        self._stopped = False
        self.report = Edit(tuple(dict.fromkeys(modules.wanted.values())))

    def begin(self, entrance: nn.Module, images: Tensor) -> None:
        """Keep one image of each size: a probe may need it."""
        if not self._recorded.takes_images(entrance):
            return
        self._images[(images.shape[-2], images.shape[-1])] = images[:1].detach()

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is that of a layer to edit."""
        return attention in self._recorded.wanted

    def edit(self, attention: nn.Module, pattern: Pattern) -> Pattern:
        """Return the changed pattern."""
        layer = self._recorded.wanted[attention]
        heads = heads_of(attention)
        if heads is not None and isinstance(pattern, EditedProduct) and pattern.heads != heads:
            raise NotEditedError(
                f"explicit weights (B, {heads}, Q, N) at layer {layer}",
                f"{tuple(pattern.base.matrix.shape)}",
                "This code keeps its heads elsewhere. Leave the layer out: layers=[...].",
            )
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
        if ran and not self._recorded.is_chosen:
            kinds = set(map(kind_of, ran))
            missing = [layer for layer in missing if kind_of(layer) in kinds]
        if not missing or (ran and self._stopped):
            return
        raise NotEditedError(
            "each layer to edit to run its forward inside edit(...)",
            f"{'no pass' if not ran else 'none'} of {some_of(missing)}",
            "Run the model inside the block, in the same thread, as an eager module: no exported, "
            "scripted or replicated one, and of a compiled one compiled._orig_mod(images). If a "
            "pass runs some layers only, name these: layers=[...]. A kernel that is called from "
            "outside of their forward cannot be edited.",
        )

    def _layout(self, attention: nn.Module, part: Part) -> Layout:
        """Return where the patches are among the tokens of ``part``."""
        modules = self._recorded
        kind = kind_of(modules.wanted[attention])
        sibling = next(m for m, layer in modules.all.items() if kind_of(layer) == kind)
        for images in reversed(self._images.values()):
            tokens = Tokens(
                modules.whole, modules.backbone, attention, part.columns, images, sibling
            )
            layout = tokens.layout()
            if layout is not None:
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
        return ablation(model, layers, heads)
    if frozen is not None:
        return freezing(model, layers, frozen)
    modules = recorded_in(model, layers)
    if keys is not None:
        return Hiding(checked_keys(keys), queries), modules
    if not callable(weights):
        raise InvalidInputError(
            "weights to be a function of a layer and its weights",
            f"{type(weights).__name__}",
            "Pass, for instance, lambda layer, weights: weights.roll(1, dims=1). Weights that are "
            "known before: frozen=maps.",
        )
    return Rewriting(weights, queries), modules
