"""The attention of a batch, as it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2_attn.apps.extraction.decode import Origin, Picture, Refused
from dinov2_attn.apps.extraction.options import DTYPES, Options
from dinov2_attn.apps.viz.images import normalise
from dinov2_attn.apps.viz.inference import cannot_run, check_alive
from dinov2_attn.apps.viz.reading import Reading
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.errors import Dinov2AttnError, InvalidInputError, in_one_line
from dinov2_attn.grafting.modules import weights_from
from dinov2_attn.maps.artifacts import ArtifactTokens, artifacts_on_the_way
from dinov2_attn.maps.attention_maps import AttentionMaps, attention_maps
from dinov2_attn.maps.resample import resample
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Grid


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model looks at in the images of a batch, on the model's device.

    =========  ==================================================================
    origins    where the ``B`` images come from
    grid       the patches ``(h, w)`` that the model saw
    maps       ``(B, layers, heads, queries, H, W)``: ``grid``, or the one asked for;
               without ``heads`` for their mean
    prefix     ``(B, layers, heads, queries, 1 + R)``: CLS and registers
    artifacts  the batch's artifact tokens, where they were asked for
    =========  ==================================================================
    """

    origins: list[Origin]
    grid: Grid
    maps: Tensor
    prefix: Tensor
    artifacts: ArtifactTokens | None


def look(model: Any, pictures: list[Picture], options: Options) -> Iterator[Seen | Refused]:
    """Yield what ``model`` looks at in ``pictures``, which are of one size.

    They are seen together or, where that fails, one by one: an image on which the model fails
    by itself is refused with what it raised. Which images run together depends on the images
    alone, so that a second run makes the same bytes. Raises what is about every image: errors
    of ours such as ``NotGraftedError``, and ``UnavailableError`` where the device works no more.
    """
    seen = _seen_or_refused(model, pictures, options)
    if isinstance(seen, Refused):
        check_alive(next(model.parameters()).device)
    if isinstance(seen, Seen) or len(pictures) == 1:
        yield seen
        return
    for picture in pictures:
        yield from look(model, [picture], options)


def _seen_or_refused(model: Any, pictures: list[Picture], options: Options) -> Seen | Refused:
    """Return what ``model`` sees, or its error as one of the first picture.

    The error itself would keep the tensors of the pass in memory.
    """
    try:
        return _look(model, pictures, options)
    except InvalidInputError as error:
        return _refused(pictures[0], error)
    except (Dinov2AttnError, Warning):
        raise
    except Exception as error:  # upstream's code and hooks of the user's raise what they like
        height, width = pictures[0].sides
        found = f"{pictures[0].origin.item.path}, of which it sees {height} × {width} pixels"
        smaller = "Give a smaller image size, or pass over large ones: --max-pixels."
        return _refused(pictures[0], cannot_run(error, found, smaller))


def _refused(picture: Picture, error: InvalidInputError) -> Refused:
    return Refused(picture.origin.number, picture.origin.item, in_one_line(error), "pass")


@torch.inference_mode()
def _look(model: Any, pictures: list[Picture], options: Options) -> Seen:
    like = next(model.parameters())
    images = _on_device(pictures, like.device, options.reading).to(like.dtype)
    maps, artifacts = _maps(model, images, options)
    # One layer after the other behind the batch.
    patches = torch.stack(maps.patch_maps(), dim=1)
    if options.grid is not None:
        patches = resample(patches, options.grid)
    dtype = DTYPES[options.dtype]
    return Seen(
        origins=[picture.origin for picture in pictures],
        grid=maps.grid,  # type: ignore[arg-type]  # that of one batch
        maps=patches.to(dtype),
        prefix=torch.stack([w[..., : maps.prefix] for w in maps.weights], dim=1).to(dtype),
        artifacts=artifacts,
    )


def _on_device(pictures: list[Picture], device: torch.device, reading: Reading) -> Tensor:
    """Return a batch ``(B, C, H, W)``, normalised unless it came as tensors."""
    tensors = [one.pixels for one in pictures if isinstance(one.pixels, Tensor)]
    if tensors:
        return torch.stack(tensors).to(device)
    # A quarter of what floats would be on their way to the device.
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # from where the copy runs beside the kernels
    return normalise(pixels.to(device, non_blocking=True), reading)


def _maps(
    model: Any, images: Tensor, options: Options
) -> tuple[AttentionMaps, ArtifactTokens | None]:
    """Return the attention of ``images`` and, where asked for, the artifacts, in one pass."""
    asked: dict[str, Any] = {"queries": options.rows, "heads": options.heads}
    if not options.outliers:
        return attention_maps(model, images, options.layers, **asked), None
    backbone = Backbone(model)
    asked["queries"] = backbone.resolve_names(options.rows)
    weights = {}

    def visit(i: int, block: nn.Module, tokens: Tensor) -> None:
        if i in options.layers:
            weights[i] = weights_from(block, tokens, **asked)

    artifacts = artifacts_on_the_way(model, images, visit)
    each = tuple(weights[layer] for layer in options.layers)
    rows = positions(asked["queries"], backbone.length(images))
    grid = backbone.grid(images)
    return AttentionMaps(each, options.layers, grid, backbone.prefix, rows), artifacts
