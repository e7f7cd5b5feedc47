"""Artifact tokens: patches that a model uses as memory, seen by their norm and their attention.

Large models put global information into a few patches of little content, whose norm then is
many times that of the others, and whose column outshines every map. They are found and
reported here; nothing is changed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone, grafted_backbone
from dinov2_attn.errors import SuspiciousArtifactsWarning
from dinov2_attn.grafting.channel import unrecorded
from dinov2_attn.grafting.modules import queries_and_keys_from
from dinov2_attn.maps.outliers import DEVIATIONS, FLOOR, Rule, median
from dinov2_attn.maps.rollout import Layer
from dinov2_attn.typing import Images, Masks, Model

# More than this share of the patches are no artifacts, of which there are 2 or 3 in a hundred.
MOST = 0.1
# Tokens named in a line of text.
NAMED = 6


@dataclass(frozen=True, eq=False)
class ArtifactTokens:
    """The artifact tokens of a batch of images, and what they were told by.

    =========  =======================================================================
    mask       bool ``(B, h, w)``: patches whose norm is above the threshold
    norms      ``(B, h, w)``: Euclidean norms of the output of block ``layer``, before any
               final LayerNorm; float32 at least
    layer      int64 ``(B,)``: the block, counted from 0, that an image's norms are read after
    threshold  ``(B,)``: of the norms of each image
    from_cls   ``(B, h, w)``: what CLS gives to each patch in the last block, mean of heads
    from_all   ``(B, h, w)``: what a token gives to each patch there, mean of heads and of
               all N tokens
    cls_sinks  bool ``(B, h, w)``: patches that stand out in ``from_cls``
    sinks      bool ``(B, h, w)``: patches that stand out in ``from_all``
    =========  =======================================================================

    Norms tell artifacts. Attention alone does not: a patch may receive much for what it
    shows, and so the sinks are a second opinion. All four masks are made by one rule.
    """

    mask: Tensor
    norms: Tensor
    layer: Tensor
    threshold: Tensor
    from_cls: Tensor
    from_all: Tensor
    cls_sinks: Tensor
    sinks: Tensor

    @property
    def share(self) -> Tensor:
        """The share ``(B,)`` of CLS's attention in the last block that the artifacts hold."""
        return (self.from_cls * self.mask).sum((-2, -1))

    @property
    def suspicious(self) -> Tensor:
        """Bool ``(B,)``: more than one patch, and more than 10 % of them, are flagged."""
        height, width = self.mask.shape[1:]
        return self.mask.flatten(1).sum(1) > max(1, MOST * height * width)

    def cpu(self) -> ArtifactTokens:
        """Return the same on the CPU."""
        return ArtifactTokens(**{f.name: getattr(self, f.name).cpu() for f in fields(self)})

    def report(self) -> list[dict[str, Any]]:
        """Return one dictionary of JSON's own types for each image.

        ``grid`` (h, w), ``layer``, ``threshold``, ``median`` (of the norms), ``share``,
        ``suspicious``, and the lists ``tokens``, ``cls_sinks`` and ``sinks`` of patches, each
        with ``row``, ``col``, ``norm``, ``from_cls`` and ``from_all``; in ``tokens`` the
        largest norm comes first, in the others the largest attention. A number that is not
        finite is ``None``.
        """
        return [self._report(i) for i in range(len(self.mask))]

    def describe(self) -> list[str]:
        """Return one line of text for each image: what stands out, where, and what it holds."""
        return [_in_words(entry) for entry in self.report()]

    def _report(self, i: int) -> dict[str, Any]:
        patches = self.norms[i].numel()
        return {
            "grid": list(self.norms.shape[1:]),
            "layer": int(self.layer[i]),
            "threshold": _number(self.threshold[i]),
            "median": _number(median(self.norms[i].reshape(1, patches))[0]),
            "share": _number(self.share[i]),
            "suspicious": bool(self.suspicious[i]),
            "tokens": self._tokens(i, self.mask, self.norms),
            "cls_sinks": self._tokens(i, self.cls_sinks, self.from_cls),
            "sinks": self._tokens(i, self.sinks, self.from_all),
        }

    def _tokens(self, i: int, mask: Tensor, order: Tensor) -> list[dict[str, Any]]:
        places = mask[i].nonzero().tolist()
        places.sort(key=lambda place: -float(order[i][tuple(place)]))
        return [
            {
                "row": row,
                "col": col,
                "norm": _number(self.norms[i, row, col]),
                "from_cls": _number(self.from_cls[i, row, col]),
                "from_all": _number(self.from_all[i, row, col]),
            }
            for row, col in places
        ]


@overload
def artifact_tokens(
    model: Model,
    images: Tensor,
    layer: int | None = None,
    *,
    masks: Tensor | None = None,
    deviations: float = DEVIATIONS,
    floor: float = FLOOR,
) -> ArtifactTokens: ...
@overload
def artifact_tokens(
    model: Model,
    images: Sequence[Tensor],
    layer: int | None = None,
    *,
    masks: Sequence[Tensor | None] | None = None,
    deviations: float = DEVIATIONS,
    floor: float = FLOOR,
) -> list[ArtifactTokens]: ...


@torch.no_grad()
def artifact_tokens(
    model: Any,
    images: Images,
    layer: int | None = None,
    *,
    masks: Masks = None,
    deviations: float = DEVIATIONS,
    floor: float = FLOOR,
) -> ArtifactTokens | list[ArtifactTokens]:
    """Return the artifact tokens of ``images``, an ``ArtifactTokens``; for a list, a list of these.

    ==========  ====================================================================
    images      ``(B, C, H, W)``, or a list of such batches
    layer       the block after which norms are read; ``None``: of those from a third of
                the depth to the second-to-last, for each image the one whose most
                outstanding token is furthest above its threshold
    masks       ``None`` or boolean ``(B, h·w)``; for a list, one for each tensor
    deviations  how many median absolute deviations from the median an outlier is
    floor       how many times the median it is at least
    ==========  ====================================================================

    A value is an outlier of its image when it is above
    ``max(median + deviations · MAD, floor · median)`` of all patches; CLS and registers are
    not judged. Norms are read inside because smaller models show no artifacts at the output,
    and before the final LayerNorm because that hides them. The same rule is put to what
    patches receive in the last block, from CLS and from all tokens.

    Costs one forward pass and one softmax over the last block's matrix, which is not kept:
    memory is that of the tokens of one block. Nothing is differentiated, no hook is set,
    recordings around it see nothing.

    Warns with ``SuspiciousArtifactsWarning`` where more than 10 % of an image's patches (and more
    than one) are flagged: that is no artifact any more. Raises ``InvalidInputError`` and
    ``OutOfRangeError`` for what cannot be, ``NotGraftedError`` where ``install`` has not reached.

    Sources: Darcet et al., *Vision Transformers Need Registers*, 2023 (norms); Jiang et al.,
    *Vision Transformers Don't Need Trained Registers*, 2025 (attention follows norms).
    """
    backbone = grafted_backbone(model)
    rule = Rule(deviations, floor)
    layers = _candidates(backbone, layer)
    pairs = backbone.batches(images, masks)
    with unrecorded():
        found = [_one(backbone, batch, mask, layers, rule) for batch, mask in pairs]
    _warn(found)
    return found if isinstance(images, list | tuple) else found[0]


# Shown the number of a block, the block and what it is given.
Visit = Callable[[int, nn.Module, Tensor], None]


@torch.no_grad()
def artifacts_on_the_way(model: Any, images: Tensor, visit: Visit) -> ArtifactTokens:
    """Return ``artifact_tokens`` of ``images``; every block is shown to ``visit`` before it runs.

    So a second question to the same tokens takes no second pass. Nothing is warned of.
    """
    backbone = Backbone(model)
    with unrecorded():
        return _one(backbone, images, None, _candidates(backbone, None), Rule(), visit)


def _pass_by(*_: object) -> None:
    """Let a block run that nobody asks anything of."""


def _one(
    backbone: Backbone,
    images: Tensor,
    masks: Any,
    layers: list[int],
    rule: Rule,
    visit: Visit = _pass_by,
) -> ArtifactTokens:
    grid, prefix = backbone.grid(images), backbone.prefix
    start = backbone.tokens(images, masks)
    choice, block, tokens = _Choice(rule, start), backbone.blocks[0], start
    for i, block, tokens in backbone.walk(start):  # the last one is asked below
        visit(i, block, tokens)
        if i - 1 in layers:
            choice.add(i - 1, _norms(tokens[:, prefix:], grid))
    if backbone.depth - 1 in layers:
        choice.add(backbone.depth - 1, _norms(block(tokens)[:, prefix:], grid))
    from_cls, from_all = (
        received[:, prefix:].reshape(-1, *grid) for received in _received(block, tokens)
    )
    return ArtifactTokens(
        mask=rule.outliers(choice.norms),
        norms=choice.norms,
        layer=choice.layer,
        threshold=rule.thresholds(choice.norms),
        from_cls=from_cls,
        from_all=from_all,
        cls_sinks=rule.outliers(from_cls),
        sinks=rule.outliers(from_all),
    )


class _Choice:
    """Of each image the layer whose largest norm is furthest above its threshold."""

    def __init__(self, rule: Rule, tokens: Tensor) -> None:
        self._rule = rule
        self._excess = torch.full((len(tokens),), -math.inf, device=tokens.device)
        self.norms = tokens.new_zeros(1)
        self.layer = torch.zeros_like(self._excess, dtype=torch.int64)

    def add(self, layer: int, norms: Tensor) -> None:
        """Take ``norms (B, h, w)`` after block ``layer`` for the images where they tell more."""
        excess = self._rule.excess(norms)
        further = excess > self._excess
        self.norms = torch.where(further[:, None, None], norms, self.norms)
        self.layer = torch.where(further, layer, self.layer)
        self._excess = torch.maximum(excess, self._excess)


def _candidates(backbone: Backbone, layer: int | None) -> list[int]:
    if layer is None:
        return list(range(backbone.depth // 3, max(backbone.depth - 1, 1)))
    return backbone.layers([layer])


def _norms(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    dtype = torch.promote_types(patches.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(patches, dim=-1, dtype=dtype)
    return norms.reshape(-1, *grid)


def _received(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each token gets from CLS and from all tokens, ``(B, N)`` each, heads averaged."""
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)
    shares = torch.full((2, length), 1 / length, dtype=torch.float32, device=tokens.device)
    shares[0] = positions == 0
    pieces = queries_and_keys_from(block, tokens, None)
    # The rows are made a few at a time: all that is kept of the matrix are two sums.
    layer = Layer("mean", residual=0.0)
    each = [
        layer.push(shares.expand(len(piece.query), -1, -1), positions, piece, scale)
        for piece, scale in pieces
    ]
    received = torch.cat(each)
    return received[:, 0], received[:, 1]


def _warn(found: list[ArtifactTokens]) -> None:
    count = sum(int(artifacts.suspicious.sum()) for artifacts in found)
    if count:
        warnings.warn(
            f"more than {MOST:.0%} of the patches have outlying norms in {count} of "
            f"{sum(len(artifacts.mask) for artifacts in found)} images: artifacts are rarer. "
            "Look at .norms: weights may be random, or images flat.",
            SuspiciousArtifactsWarning,
            stacklevel=4,
        )


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _in_words(entry: dict[str, Any]) -> str:
    patches, tokens = math.prod(entry["grid"]), entry["tokens"]
    where = f"after block {entry['layer']}"
    if not tokens:
        return f"no artifact tokens among {patches} patches (norms {where})"
    named = ", ".join(
        f"({token['row']}, {token['col']}) {_short(token['norm'])}" for token in tokens[:NAMED]
    )
    more = f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else ""
    doubt = "; so many are no artifacts" if entry["suspicious"] else ""
    return (
        f"{len(tokens)} of {patches} patches with a norm above {_short(entry['threshold'])} "
        f"{where}: {named}{more}; they hold {_percent(entry['share'])} of CLS's attention in the "
        f"last block{doubt}"
    )


def _short(number: float | None) -> str:
    return "?" if number is None else f"{number:.4g}"


def _percent(number: float | None) -> str:
    return "?" if number is None else f"{100 * number:.1f} %"
