"""Statistics of the attention of any model on one batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.calls import check_depth
from dinov2_attn.maps.measuring import STATISTICS, check_statistics
from dinov2_attn.maps.one_batch import batches_of, only_one, run_model
from dinov2_attn.maps.record import record_one
from dinov2_attn.maps.statistics import Statistics
from dinov2_attn.typing import Heads, Images, Masks, Model, RecordedLayers, Statistic


@overload
def statistics(
    model: Model,
    images: Tensor,
    of: Sequence[Statistic] | Statistic = STATISTICS,
    layers: RecordedLayers = None,
    masks: Tensor | None = None,
    *,
    heads: Heads = None,
) -> Statistics: ...
@overload
def statistics(
    model: Model,
    images: Sequence[Tensor],
    of: Sequence[Statistic] | Statistic = STATISTICS,
    layers: RecordedLayers = None,
    masks: Sequence[Tensor | None] | None = None,
    *,
    heads: Heads = None,
) -> list[Statistics]: ...


@torch.no_grad()
def statistics(
    model: Any,
    images: Images,
    of: Sequence[Statistic] | Statistic = STATISTICS,
    layers: RecordedLayers = None,
    masks: Masks = None,
    *,
    heads: Heads = None,
) -> Statistics | list[Statistics]:
    """Return statistics of the attention of ``model``, of every query, head and layer.

    >>> found = statistics(model, images, ("entropy", "distance"))
    >>> found["entropy"][-1]       # (B, heads, Q) of the last layer
    >>> found.by_head("distance")  # (layers, B, heads)

    With A the weights ``(Q, N)`` of a head before dropout, P the patches among the N keys, and
    p the position of a patch on the patch grid:

    - ``"entropy"``: ``-Σ_k A_qk ln A_qk``, in nats: 0 for one key, ln N for all alike.
    - ``"distance"``: ``Σ_k∈P A_qk |p_q - p_k| / Σ_k∈P A_qk``, the mean distance in patches. Times
      the side of a patch it is in pixels, as papers have it. NaN for a query that is no patch.
    - ``"received"``: ``Σ_q A_qk / Q``, what a key gets on average.
    - ``"prefix_mass"``: ``Σ_k∉P A_qk``, the attention to CLS and registers together.
    - ``"centroid"``: ``c_q = Σ_k∈P A_qk p_k / Σ_k∈P A_qk``, row and column of the mean position.
    - ``"spread"``: ``√(Σ_k∈P A_qk |p_k - c_q|² / Σ_k∈P A_qk)``, in patches.

    A query that attends to no patch has NaN for the last two and for the distance, and a row with
    a negative weight for the entropy. Weights of a pass inside ``edit`` are the edited ones.

    Memory beyond one forward pass is O(N): a few rows of weights exist at a time. Statistics are in
    float32 at least, and are not differentiated.

    Args:
        model: Any module with attention inside, whose forward takes images as its first argument.
        images: ``(B, C, H, W)``, or a list of such batches.
        of: The names of the statistics, all of them by default.
        layers: As in ``attention_maps``.
        masks: As in ``attention_maps``.
        heads: None for each head. ``"mean"`` for the statistics of the mean of their weights,
            which are not the means of their statistics: ``found.by_head(...).mean(-1)`` is.

    Returns:
        The statistics of the batch; for a list of batches, a list of them.

    Raises:
        InvalidInputError: An argument is of the wrong kind or shape, the model has no attention, a
            pass has attention of several kinds, or a statistic needs a patch grid and none is
            found.
        OutOfRangeError: A layer does not exist.
        NotRecordedError: An attention module calls no kernel that can be seen.

    Sources: Raghu et al., *Do Vision Transformers See Like Convolutional Neural Networks?*, 2021,
    and Dosovitskiy et al., *An Image is Worth 16x16 Words*, 2021 (mean attention distance).

    """
    names = check_statistics(of)
    if not names:
        raise InvalidInputError(
            "at least one statistic", f"of={of!r}", "Leave of= out for all of them."
        )
    pairs = batches_of(model, images, masks)
    check_depth(model)
    ask = partial(record_one, model, layers, queries=[], heads=heads, statistics=names)
    found = [only_one(ask(partial(run_model, model, *pair)).passes).statistics for pair in pairs]
    return found[0] if isinstance(images, Tensor) else found
