"""Artifact tokens: patches that a model uses as memory, found by norm and attention.

Large models store global information in a few patches of little content. The norm of such a
patch is many times that of the others, and its column dominates every map. They are found and
reported here; nothing is changed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, overload

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone, grafted_backbone
from dinov2_attn.backbone.projection import Piece
from dinov2_attn.errors import SuspiciousArtifactsWarning
from dinov2_attn.grafting.channel import unrecorded
from dinov2_attn.grafting.modules import queries_and_keys_from
from dinov2_attn.grafting.ways import runs_itself
from dinov2_attn.maps import _facts
from dinov2_attn.maps._artifact_text import in_words
from dinov2_attn.maps.outliers import DEVIATIONS, FLOOR, Rule, median
from dinov2_attn.maps.own_pass import pieces, scores_of_pass
from dinov2_attn.maps.result import Array, Result, W, as_array
from dinov2_attn.maps.rollout import Layer
from dinov2_attn.typing import Images, Masks, Model

# More than this share of the patches are no artifacts, of which there are 2 or 3 in a hundred.
MOST = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class ArtifactTokens(Result, Generic[W]):
    """The artifact tokens of a batch of images, and the evidence for them.

    Norms decide what is an artifact. Attention alone does not: a patch may receive much for
    its content, so the sinks are a second opinion. One rule makes all masks.

    Attributes:
        mask: Bool ``(B, h, w)``: patches whose norm is above the threshold.
        norms: ``(B, h, w)``: Euclidean norms of the output of block ``layer``, before any
            final LayerNorm; float32 at least.
        layer: int64 ``(B,)``: the block, counted from 0, after which an image's norms are read.
        threshold: ``(B,)``: of the norms of each image.
        from_cls: ``(B, h, w)``: the attention of CLS to each patch in the last block, mean of
            heads.
        from_all: ``(B, h, w)``: the attention to each patch there, mean of heads and of all N
            tokens.
        cls_sinks: Bool ``(B, h, w)``: outliers of ``from_cls``.
        sinks: Bool ``(B, h, w)``: outliers of ``from_all``.

    """

    mask: W
    norms: W
    layer: W
    threshold: W
    from_cls: W
    from_all: W
    cls_sinks: W
    sinks: W

    @property
    def share(self) -> W:
        """The share ``(B,)`` of CLS's attention in the last block that the artifacts hold."""
        from_cls: Any = self.from_cls
        share: W = (from_cls * self.mask).sum((-2, -1))
        return share

    @property
    def suspicious(self) -> W:
        """Bool ``(B,)``: more than one patch, and more than 10 % of them, are flagged."""
        mask: Any = self.mask
        height, width = mask.shape[1:]
        suspicious: W = mask.sum((-2, -1)) > max(1, MOST * height * width)
        return suspicious

    def numpy(self: ArtifactTokens[Tensor]) -> ArtifactTokens[Array]:
        """Return the same with NumPy arrays."""
        arrays: ArtifactTokens[Array] = self._with(as_array)
        return arrays

    def report(self) -> list[dict[str, Any]]:
        """Return one dictionary of JSON's own types for each image.

        Its keys are ``grid`` (h, w), ``layer``, ``threshold``, ``median`` (of the norms),
        ``share``, ``suspicious``, and the lists ``tokens``, ``cls_sinks`` and ``sinks`` of
        patches. Each patch has ``row``, ``col``, ``norm``, ``from_cls`` and ``from_all``. The
        largest norm comes first in ``tokens``, the largest attention in the others. A number
        that is not finite is ``None``.
        """
        own = {f.name: torch.as_tensor(getattr(self, f.name)) for f in fields(self)}
        tensors = ArtifactTokens(**own)
        return [tensors._report(i) for i in range(len(tensors.mask))]

    def describe(self) -> list[str]:
        """Return one line of text for each image: which patches, where, and their attention."""
        return [in_words(entry) for entry in self.report()]

    def _facts(self) -> dict[str, str]:
        mask: Any = self.mask
        return {
            "images": f"{len(mask)}",
            "grid": _facts.size(tuple(mask.shape[1:])),
            "layer": _facts.values(self.layer),
            "tokens": _facts.values(mask.sum((-2, -1))),
        }

    def _report(self: ArtifactTokens, i: int) -> dict[str, Any]:
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

    def _tokens(self: ArtifactTokens, i: int, mask: Tensor, order: Tensor) -> list[dict[str, Any]]:
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
    """Return the artifact tokens of ``images``.

    A value is an outlier of its image if it is above
    ``max(median + deviations · MAD, floor · median)`` of all patches; CLS and registers are
    not judged. Norms are read inside the model because smaller models show no artifacts at the
    output, and before the final LayerNorm because it hides them. The same rule is applied to
    the attention that patches receive in the last block, from CLS and from all tokens.

    The cost is one forward pass and one softmax over the last block's matrix, which is not
    kept: memory is that of the tokens of one block. Nothing is differentiated, no hook is set,
    and recordings around the call see nothing.

    Args:
        model: A DINOv2 that ``install`` has reached.
        images: ``(B, C, H, W)``, or a list of such batches.
        layer: The block after which norms are read. ``None``: for each image the block whose
            largest norm is furthest above its threshold, from a third of the depth to the
            second-to-last block.
        masks: ``None`` or boolean ``(B, h·w)``; for a list, one for each batch.
        deviations: The least distance of an outlier from the median, in median absolute
            deviations.
        floor: The least outlier, in medians.

    Returns:
        The artifact tokens of the batch; for a list of batches, a list of these.

    Raises:
        InvalidInputError: An argument is of the wrong kind or shape.
        OutOfRangeError: The layer does not exist.
        NotGraftedError: ``install`` has not reached the model.

    Warns:
        SuspiciousArtifactsWarning: More than 10 % of an image's patches, and more than one,
            are flagged: these are no artifacts.

    Sources: Darcet et al., *Vision Transformers Need Registers*, 2023 (norms); Jiang et al.,
    *Vision Transformers Don't Need Trained Registers*, 2025 (attention follows norms).

    """
    backbone = grafted_backbone(model)
    rule = Rule(deviations, floor)
    layers = _candidates(backbone, layer)
    pairs = backbone.batches(images, masks)
    with unrecorded():
        one = _one_of_own_pass if runs_itself(backbone.model) else _one
        found = [one(backbone, batch, mask, layers, rule) for batch, mask in pairs]
    _warn(found)
    return found if isinstance(images, list | tuple) else found[0]


# Called with the number of a block, the block and its input tokens.
Visit = Callable[[int, nn.Module, Tensor], None]


@torch.no_grad()
def artifacts_on_the_way(model: Any, images: Tensor, visit: Visit) -> ArtifactTokens:
    """Return ``artifact_tokens`` of ``images``, calling ``visit`` with every block before it runs.

    So a second question to the same tokens needs no second pass. There are no warnings.
    """
    backbone = Backbone(model)
    with unrecorded():
        return _one(backbone, images, None, _candidates(backbone, None), Rule(), visit)


@torch.no_grad()
def artifacts_of_own_pass(model: Any, images: Tensor) -> ArtifactTokens:
    """Return ``artifact_tokens`` of a model that has to run its own pass. There are no warnings."""
    backbone = Backbone(model)
    return _one_of_own_pass(backbone, images, None, _candidates(backbone, None), Rule())


def _pass_by(*_: object) -> None:
    """Do nothing before a block runs."""


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
    for i, block, tokens in backbone.walk(start):  # the last one is used below
        visit(i, block, tokens)
        if i - 1 in layers:
            choice.add(i - 1, _norms(tokens[:, prefix:], grid))
    if backbone.depth - 1 in layers:
        choice.add(backbone.depth - 1, _norms(block(tokens)[:, prefix:], grid))
    received = _received(queries_and_keys_from(block, tokens, None), tokens)
    return _found(choice, received, rule, prefix, grid)


def _one_of_own_pass(
    backbone: Backbone, images: Tensor, masks: Any, layers: list[int], rule: Rule
) -> ArtifactTokens:
    """Return the same of a model whose blocks cannot be walked over from outside."""
    grid, prefix, last = backbone.grid(images), backbone.prefix, backbone.depth - 1
    outputs = dict.fromkeys([*layers, last], images)
    (scored,) = scores_of_pass(backbone, images, masks, [last], outputs)
    choice = _Choice(rule, outputs[last])
    for layer in layers:
        choice.add(layer, _norms(outputs[layer][:, prefix:], grid))
    received = _received(pieces(scored, None), outputs[last])
    return _found(choice, received, rule, prefix, grid)


def _found(
    choice: _Choice,
    received: tuple[Tensor, Tensor],
    rule: Rule,
    prefix: int,
    grid: tuple[int, int],
) -> ArtifactTokens:
    from_cls, from_all = (to[:, prefix:].reshape(-1, *grid) for to in received)
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
    """For each image the layer whose largest norm is furthest above its threshold."""

    def __init__(self, rule: Rule, tokens: Tensor) -> None:
        self._rule = rule
        self._excess = torch.full((len(tokens),), -math.inf, device=tokens.device)
        self.norms = tokens.new_zeros(1)
        self.layer = torch.zeros_like(self._excess, dtype=torch.int64)

    def add(self, layer: int, norms: Tensor) -> None:
        """Take ``norms (B, h, w)`` after block ``layer`` for images where they stand out more."""
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


def _received(scored: list[tuple[Piece, float]], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention to each token, from CLS and from all tokens, ``(B, N)`` each."""
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)
    shares = torch.full((2, length), 1 / length, dtype=torch.float32, device=tokens.device)
    shares[0] = positions == 0
    # Rows are computed a few at a time; only two sums of the matrix are kept.
    layer = Layer("mean", residual=0.0)
    each = [
        layer.push(shares.expand(len(piece.query), -1, -1), positions, piece, scale)
        for piece, scale in scored
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
