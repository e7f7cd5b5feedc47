"""The attention of any model on one batch of images: the question that most users ask."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, overload

from torch import Tensor, nn

from dinov2_attn._compat import is_compiled, is_transformed
from dinov2_attn.backbone.backbone import Backbone, check_images, check_list, transformers_in
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.structure import attention_modules, name_of
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.models import asked_layers, is_grafted
from dinov2_attn.grafting.modules import runs_itself
from dinov2_attn.grafting.tokens import Tokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.layers import has_paths, kind_of
from dinov2_attn.maps.record import record_one
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import (
    Heads,
    Images,
    Masks,
    Model,
    Queries,
    RecordedLayers,
    Source,
)

# The names by which models take the masks of their patches: upstream's, transformers'.
_MASKS = ("masks", "bool_masked_pos")


@overload
def attention_maps(
    model: Model,
    images: Tensor,
    layers: RecordedLayers = None,
    masks: Tensor | None = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps: ...
@overload
def attention_maps(
    model: Model,
    images: Sequence[Tensor],
    layers: RecordedLayers = None,
    masks: Sequence[Tensor | None] | None = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> list[AttentionMaps]: ...


def attention_maps(
    model: Any,
    images: Images,
    layers: RecordedLayers = None,
    masks: Masks = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> AttentionMaps | list[AttentionMaps]:
    """Return the attention of ``model`` on ``images``, with grid and prefix.

    >>> maps = attention_maps(model, images, layers=1, queries="cls")
    >>> maps.patch_maps()[0]   # (B, heads, 1, h, w)
    >>> maps.prefix_mass()[0]  # (B, heads, 1)

    Any model will do, without ``install``: of timm, of transformers, a depth model. Its own
    ``model(images)`` runs, and ends with the last layer that is needed where that is known. Where
    the patches are among the tokens is measured once for each model (see ``record``).
    Gradients flow when grad is on.

    Args:
        model: A module whose forward takes images as its first argument.
        images: ``(B, C, H, W)``, or a list of such batches.
        layers: ``None`` for all layers, an int for the last so many, or a sequence. A model with
            one DINOv2 inside has numbered blocks. Layers of any other model are the paths of
            attention modules, or places in their order.
        masks: ``None`` or boolean ``(B, h·w)``; for a list, one for each batch.
        queries: The tokens whose rows are wanted: ``None`` for all, ``"cls"``,
            ``"registers"``, ``"patches"``, a position, a slice or a sequence of positions.
        heads: ``None`` for each head, ``"mean"`` for their mean.

    Returns:
        The maps of the batch; for a list of batches, a list of maps.

    Raises:
        InvalidInputError: An argument is of the wrong kind or shape, the model has no attention,
            or a pass has attention of several kinds.
        OutOfRangeError: A layer or a query does not exist.
        NotRecordedError: An attention module calls no kernel that can be seen.

    """
    pairs = batches_of(model, images, masks)
    if not has_paths(layers) and walks_as_counted(model, [batch for batch, _ in pairs]):
        found = _of_grafted(model, images, layers, masks, queries, heads)
    else:
        ask = partial(record_one, model, layers, queries=queries, heads=heads)
        found = [only_one(ask(partial(run_model, model, *pair)).passes) for pair in pairs]
    return found[0] if isinstance(images, Tensor) else found


def batches_of(model: Any, images: Any, masks: Any) -> list[tuple[Tensor, Any]]:
    """Return each batch of ``images`` with its mask, checked, as ``model`` runs them.

    Raises:
        InvalidInputError: If the model cannot take them.

    """
    if is_grafted(model):
        return Backbone(model).batches(images, masks)
    if isinstance(model, nn.Module) and transformers_in(model)[:1] == [model]:
        return Backbone(model).batches(images, masks)
    several = isinstance(images, list | tuple)
    pairs = [(images, masks)]
    if several:
        pairs = list(zip(images, check_list(images, masks), strict=True))
    for batch, _ in pairs:
        check_images(batch)
    return pairs


def walks_as_counted(model: Any, batches: Sequence[Tensor]) -> bool:
    """Return whether ``install`` reached ``model``, and its tokens are CLS, registers, patches.

    Then its blocks can be run one by one from outside. Others run their own pass.
    """
    if not is_grafted(model) or runs_itself(model):
        return False
    backbone = Backbone(model)
    if any(getattr(block, "is_causal", False) for block in backbone.blocks):
        return False  # queries and keys alone do not say its weights
    if is_transformed() or any(map(is_compiled, backbone.model.modules())):
        return True  # a probe would compile the model again
    attention = next(iter(attention_modules(backbone.blocks[0]).values()), None)
    if attention is None:
        return True
    for batch in batches:
        layout = Tokens(backbone.model, backbone, attention, None, batch).layout()
        if layout != Layout(backbone.prefix, 0, backbone.grid(batch)):
            return False
    return True


def run_model(model: Any, images: Tensor, masks: Any = None) -> Any:
    """Return what ``model`` returns for ``images``, with ``masks`` by the name it has for them.

    Raises:
        InvalidInputError: If there are masks, and it takes none.

    """
    if masks is None:
        return model(images)
    for run in (model, getattr(model, "forward_features", model)):
        taken = inspect.signature(getattr(run, "forward", run)).parameters
        for name in filter(taken.__contains__, _MASKS):
            return run(images, **{name: masks})
    raise InvalidInputError(
        f"a model whose forward takes {' or '.join(_MASKS)}",
        name_of(type(model)),
        "Leave masks out, or record the pass yourself: with record(model) as maps: model(...).",
    )


def _of_grafted(
    model: Any,
    images: Images,
    layers: Any,
    masks: Masks,
    queries: Queries,
    heads: Heads,
) -> list[AttentionMaps]:
    """Return the maps of a model whose blocks run one by one, from outside."""
    backbone = Backbone(model)
    weights = model.get_self_attention(images, layers, masks, queries=queries, heads=heads)
    spelled, numbers = backbone.resolve_names(queries), backbone.layers(layers)
    asked = asked_layers(backbone, numbers)
    sources: tuple[Source, ...] = tuple("projection" if i in asked else "kernel" for i in numbers)

    def of_batch(batch: Tensor, own: tuple[Tensor, ...]) -> AttentionMaps:
        rows = positions(spelled, backbone.length(batch))
        grid, prefix = backbone.grid(batch), backbone.prefix
        return AttentionMaps(own, tuple(numbers), grid, prefix, rows, sources=sources)

    if isinstance(images, Tensor):
        return [of_batch(images, weights)]
    return [of_batch(batch, tuple(layer[i] for layer in weights)) for i, batch in enumerate(images)]


def only_one(passes: list[AttentionMaps]) -> AttentionMaps:
    """Return the only one of ``passes``.

    Raises:
        InvalidInputError: If there are several, of other kinds of attention.

    """
    if len(passes) == 1:
        return passes[0]
    kinds = list(dict.fromkeys(kind_of(layer) for maps in passes for layer in maps.layers))
    raise InvalidInputError(
        "attention of one kind in a pass, by each layer once",
        f"{len(passes)} of {', '.join(filter(None, kinds)) or 'blocks'}",
        "Name layers of one kind, layers=[...], or see each of them: with record(model) as maps.",
    )
