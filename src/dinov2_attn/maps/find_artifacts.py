"""Find artifact tokens: in the norms of patches, and in the attention that patches receive."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.errors import InvalidInputError, SuspiciousArtifactsWarning
from dinov2_attn.grafting.channel import unrecorded
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.maps.artifacts import MOST, ArtifactTokens, median
from dinov2_attn.maps.calls import calls_of_pass
from dinov2_attn.maps.chain import blocks_around, norms_of
from dinov2_attn.maps.layers import recorded_in
from dinov2_attn.maps.one_batch import batches_of, run_model, walks_as_counted
from dinov2_attn.maps.rollout import Layer, calls_from
from dinov2_attn.math.selection import layers_to_take
from dinov2_attn.typing import Images, Masks, Model

# 7.5 median absolute deviations are five standard deviations of a bell curve.
DEVIATIONS = 7.5
# In medians: norms that hardly differ have almost no deviation.
FLOOR = 2.5


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
    kept: memory is that of the tokens of one block. Nothing is differentiated, and recordings
    around the call see nothing. A model whose blocks cannot be run from outside runs its own pass,
    with hooks on its blocks that are removed afterwards: each has to be given the tokens that
    the one before returned.

    Args:
        model: A module whose forward takes images as its first argument.
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
        InvalidInputError: An argument is of the wrong kind or shape, or no CLS and no grid of
            one token a cell are found.
        OutOfRangeError: The layer does not exist.
        IncompatibleUpstreamError: The blocks of the model, and so the norms, are not found.

    Warns:
        SuspiciousArtifactsWarning: More than 10 % of an image's patches, and more than one,
            are flagged: these are no artifacts.

    Sources: Darcet et al., *Vision Transformers Need Registers*, 2023 (norms); Jiang et al.,
    *Vision Transformers Don't Need Trained Registers*, 2025 (attention follows norms).

    """
    rule = Rule(deviations, floor)
    pairs = batches_of(model, images, masks)
    with unrecorded():
        if walks_as_counted(model, [batch for batch, _ in pairs]):
            backbone = Backbone(model)
            layers = _candidates(backbone.depth, layer)
            found = [_one(backbone, batch, mask, layers, rule) for batch, mask in pairs]
        else:
            found = [_of_pass(model, batch, mask, layer, rule) for batch, mask in pairs]
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
        return _one(backbone, images, None, _candidates(backbone.depth, None), Rule(), visit)


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
    received = (_received(call) for _, call in calls_from(block, tokens))
    both = torch.cat(list(received))
    return _reported(choice, rule, _on_grid(both, Layout(prefix, 0, grid)))


def _of_pass(
    model: Any, images: Tensor, masks: Any, layer: int | None, rule: Rule
) -> ArtifactTokens:
    """Return the artifact tokens of a model that runs its own pass."""
    modules = recorded_in(model, None)
    blocks = blocks_around(modules.whole, modules.wanted)
    layers = _candidates(len(blocks), layer)
    run = partial(run_model, model, images, masks)
    with norms_of(modules.whole, blocks) as norms:
        calls = calls_of_pass(model, None, run, whole=True)
    layout = calls.layout(images)
    _check_layout(layout)
    choice = _Choice(rule, norms.after[0])
    for i in layers:
        choice.add(i, _on_grid(norms.after[i], layout))
    return _reported(choice, rule, _on_grid(_received(calls.take_all()[-1]), layout))


def _check_layout(layout: Layout) -> None:
    if layout.prefix and layout.per_cell == 1:
        return
    raise InvalidInputError(
        "tokens with CLS first and one for each cell of the patch grid",
        f"{layout.prefix} tokens before the patches, {layout.per_cell} for each cell",
        "Take norms and maps of such a model one by one: with record(model) as maps.",
    )


def _on_grid(columns: Tensor, layout: Layout) -> Tensor:
    """Return the patches among ``columns (…, N)`` as ``(…, h, w)``."""
    patches = columns[..., layout.patches.start : layout.patches.stop]
    return patches.reshape(*patches.shape[:-1], *layout.grid)


def _reported(choice: _Choice, rule: Rule, received: Tensor) -> ArtifactTokens:
    """Return the result; ``received (B, 2, h, w)`` is the attention from CLS and from all."""
    from_cls, from_all = received.unbind(1)
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


def _candidates(depth: int, layer: int | None) -> list[int]:
    if layer is None:
        return list(range(depth // 3, max(depth - 1, 1)))
    return layers_to_take([layer], depth)


def _norms(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    dtype = torch.promote_types(patches.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(patches, dim=-1, dtype=dtype)
    return norms.reshape(-1, *grid)


def _received(call: KernelCall) -> Tensor:
    """Return the attention to each token, from CLS and from all tokens, ``(b, 2, N)``."""
    length, device = call.columns, call.device
    positions = torch.arange(length, device=device)
    dtype = torch.promote_types(call.dtype, torch.float32)
    shares = torch.full((2, length), 1 / length, dtype=dtype, device=device)
    shares[0] = positions == 0
    # Rows are computed a few at a time; only two sums of the matrix are kept.
    return Layer("mean", residual=0.0).push(shares.expand(call.batch, -1, -1), positions, call)


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


@dataclass(frozen=True)
class Rule:
    """The rule that makes a value an outlier.

    Attributes:
        deviations: The least distance from the median, in median absolute deviations.
        floor: The least outlier, in medians.

    """

    deviations: float = DEVIATIONS
    floor: float = FLOOR

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and 0 < value < math.inf):
                raise InvalidInputError(
                    f"{field.name} as a number above 0",
                    repr(value),
                    "Leave it out for the default.",
                )

    def thresholds(self, values: Tensor) -> Tensor:
        """Return the threshold ``(B,)`` of ``values (B, h, w)``: NaN where a value is NaN."""
        flat = values.flatten(1)
        middle = median(flat)
        spread = median((flat - middle[:, None]).abs())
        return torch.maximum(middle + self.deviations * spread, self.floor * middle)

    def outliers(self, values: Tensor) -> Tensor:
        """Return the mask of ``values (B, h, w)``, none of them negative, above the threshold."""
        return values > self.thresholds(values)[:, None, None]

    def excess(self, norms: Tensor) -> Tensor:
        """Return the largest norm of each image in units of its threshold, ``(B,)``."""
        greatest, thresholds = norms.flatten(1).amax(1), self.thresholds(norms)
        # 0/0 is NaN and becomes 0; anything else by 0 becomes the largest number.
        return (greatest / thresholds).nan_to_num()
