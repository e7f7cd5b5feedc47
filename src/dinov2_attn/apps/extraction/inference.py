"""The attention of a batch, in the form in which it is stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2_attn.apps.extraction.decode import Origin, Picture, Refused
from dinov2_attn.apps.extraction.facets import (
    maps_with_others,
    stored_facets,
    stored_statistics,
)
from dinov2_attn.apps.extraction.options import DTYPES, Options
from dinov2_attn.apps.viz.images import normalise
from dinov2_attn.apps.viz.inference import cannot_run, check_alive
from dinov2_attn.apps.viz.reading import Reading
from dinov2_attn.apps.viz.tokens import resolve
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.errors import (
    Dinov2AttnError,
    InvalidInputError,
    SuspiciousArtifactsWarning,
    in_one_line,
    is_failure,
)
from dinov2_attn.grafting.modules import weights_from
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.find_artifacts import artifact_tokens, artifacts_on_the_way
from dinov2_attn.maps.geometry import geometry_of
from dinov2_attn.maps.one_batch import attention_maps, walks_as_counted
from dinov2_attn.maps.resample import resample
from dinov2_attn.math.selection import positions, resolve_names
from dinov2_attn.typing import Grid, Model


@dataclass(frozen=True, eq=False)
class BatchMaps:
    """The attention of a batch of ``B`` images, on the device of the model.

    Attributes:
        origins: Where the images come from.
        grid: The patches ``(h, w)`` of the model's input.
        maps: ``(B, layers, heads, queries, H, W)`` in ``grid`` or in the grid of the options.
            Without the dimension of heads for their mean.
        prefix: The attention to CLS and registers, ``(B, layers, heads, queries, 1 + R)``.
        entropy: That of the weights of a query in nats, ``(B, layers)``: the mean of heads and
            queries.
        artifacts: The artifact tokens of the batch, if the options ask for them.
        facets: ``(B, layers, C, H, W)`` of each facet of the options, heads joined.
        statistics: ``(B, layers, heads, N)`` of each statistic of the options.

    """

    origins: list[Origin]
    grid: Grid
    maps: Tensor
    prefix: Tensor
    entropy: Tensor
    artifacts: ArtifactTokens | None
    facets: dict[str, Tensor]
    statistics: dict[str, Tensor]


def attend_batch(
    model: Model, pictures: list[Picture], options: Options
) -> Iterator[BatchMaps | Refused]:
    """Yield the attention of ``model`` on ``pictures``, which have one size.

    They run together or, if that fails, one by one. An image on which the model fails by itself
    is refused with the reason. Which images run together depends on the images alone, so that a
    second run writes the same bytes.

    Raises:
        Dinov2AttnError: If the error concerns every image, such as ``NotGraftedError``.
        UnavailableError: If the device no longer works.

    """
    found = _maps_or_refused(model, pictures, options)
    if isinstance(found, Refused):
        check_alive(next(model.parameters()).device)
    if isinstance(found, BatchMaps) or len(pictures) == 1:
        yield found
        return
    for picture in pictures:
        yield from attend_batch(model, [picture], options)


def _maps_or_refused(
    model: Model, pictures: list[Picture], options: Options
) -> BatchMaps | Refused:
    """Return the maps, or the error of the model as one of the first picture.

    The exception itself would keep the tensors of the pass in memory.
    """
    try:
        return _attend(model, pictures, options)
    except InvalidInputError as error:
        return _refused(pictures[0], error)
    except (Dinov2AttnError, Warning):
        raise
    except BaseException as error:  # upstream's code and hooks may raise any exception
        if not is_failure(error):
            raise
        height, width = pictures[0].sides
        found = f"{pictures[0].origin.item.path}, of which it sees {height} × {width} pixels"
        smaller = "Give a smaller image size, or pass over large ones: --max-pixels."
        return _refused(pictures[0], cannot_run(error, found, smaller))


def _refused(picture: Picture, error: InvalidInputError) -> Refused:
    return Refused(picture.origin.number, picture.origin.item, in_one_line(error), "pass")


@torch.inference_mode()
def _attend(model: Model, pictures: list[Picture], options: Options) -> BatchMaps:
    like = next(model.parameters())
    images = _on_device(pictures, like.device, options.reading).to(like.dtype)
    maps, artifacts = _maps(model, images, options)
    # The dimension of layers follows that of the batch.
    patches = torch.stack(maps.patch_maps(), dim=1)
    if options.grid is not None:
        patches = resample(patches, options.grid)
    dtype = DTYPES[options.dtype]
    return BatchMaps(
        origins=[picture.origin for picture in pictures],
        grid=maps.grid,  # type: ignore[arg-type]  # one batch has one grid
        maps=patches.to(dtype),
        prefix=torch.stack([_others(w, maps) for w in maps.weights], dim=1).to(dtype),
        entropy=torch.stack([_entropy(weights) for weights in maps.weights], dim=1),
        artifacts=artifacts,
        facets=stored_facets(maps, options),
        statistics=stored_statistics(maps, options),
    )


def _others(weights: Tensor, maps: AttentionMaps) -> Tensor:
    """Return the columns of CLS and registers, those behind the patches too."""
    before = weights[..., : maps.prefix]
    behind = weights[..., weights.shape[-1] - maps.suffix :]
    return torch.cat([before, behind], -1) if maps.suffix else before


def _entropy(weights: Tensor) -> Tensor:
    """Return the entropy ``(B,)`` of weights ``(B, …, N)``: -Σ w ln w, averaged over rows."""
    wide = weights.float()
    # torch.special.entr takes ten times as long on a CPU.
    logarithms = wide.clamp_min(torch.finfo(wide.dtype).tiny).log()
    return -(wide * logarithms).sum(-1).flatten(1).mean(1)


def _on_device(pictures: list[Picture], device: torch.device, reading: Reading) -> Tensor:
    """Return a batch ``(B, C, H, W)``, normalised unless it came as tensors."""
    tensors = [one.pixels for one in pictures if isinstance(one.pixels, Tensor)]
    if tensors:
        return torch.stack(tensors).to(device)
    # A quarter of the bytes of floats is sent to the device.
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # from which the copy runs concurrently with kernels
    return normalise(pixels.to(device, non_blocking=True), reading)


def _maps(
    model: Model, images: Tensor, options: Options
) -> tuple[AttentionMaps, ArtifactTokens | None]:
    """Return the attention of ``images`` and the artifacts of the options, in one pass."""
    geometry = geometry_of(model)
    grid = geometry.grid(*images.shape[-2:])
    queries = resolve_names(resolve(options.queries, geometry.prefix, grid), geometry.registers)
    choice: dict[str, Any] = {"queries": queries, "heads": options.heads}
    if options.facets or options.statistics:
        maps = maps_with_others(model, images, options, **choice)
        return maps, _artifacts(model, images) if options.artifacts else None
    if not options.artifacts:
        return attention_maps(model, images, options.layers, **choice), None
    if not walks_as_counted(model, [images]):
        maps = attention_maps(model, images, options.layers, **choice)
        return maps, _artifacts(model, images)
    backbone, weights = Backbone(model), {}

    def visit(i: int, block: nn.Module, tokens: Tensor) -> None:
        if i in options.layers:
            weights[i] = weights_from(block, tokens, **choice)

    artifacts = artifacts_on_the_way(model, images, visit)
    each = tuple(weights[layer] for layer in options.layers)
    rows = positions(queries, backbone.length(images))
    return AttentionMaps(each, options.layers, grid, backbone.prefix, rows), artifacts


def _artifacts(model: Model, images: Tensor) -> ArtifactTokens:
    """Return the artifact tokens of ``images``, in a pass of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuspiciousArtifactsWarning)
        return artifact_tokens(model, images)
