"""The attention of a batch, as it is stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_attn.dataset.decode import Origin, Picture
from dinov2_attn.dataset.options import DTYPES, Options
from dinov2_attn.errors import InvalidInput, SuspiciousArtifacts
from dinov2_attn.maps.artifacts import ArtifactTokens, artifact_tokens
from dinov2_attn.maps.attention_maps import Grid
from dinov2_attn.maps.look import attention_maps
from dinov2_attn.maps.resample import resample
from dinov2_attn.show.images import normalise


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


def look(model: Any, pictures: list[Picture], options: Options) -> Iterator[Seen]:
    """Yield what ``model`` looks at in ``pictures``, which are of one size.

    They are seen together, or one by one where the device has no memory for that. Raises
    ``InvalidInput`` where it has none for one, and what the model raises.
    """
    try:
        yield _look(model, pictures, options)
        return
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(pictures) == 1:
            height, width, _ = pictures[0].pixels.shape
            raise InvalidInput(
                "images that the model can be run on here",
                f"{pictures[0].origin.item.path}, of which it sees {height} × {width} pixels "
                f"({str(error).partition(chr(10))[0]})",
                "Give a smaller image size, or pass over large ones: --max-pixels.",
            ) from error
    for picture in pictures:
        yield from look(model, [picture], options)


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no class of its own for it.
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )


@torch.inference_mode()
def _look(model: Any, pictures: list[Picture], options: Options) -> Seen:
    like = next(model.parameters())
    images = normalise(_on_device(pictures, like.device)).to(like.dtype)
    rows, heads = options.rows, options.heads
    maps = attention_maps(model, images, options.layers, queries=rows, heads=heads)
    # One layer after the other behind the batch.
    patches = torch.stack(maps.maps(), dim=1)
    if options.grid is not None:
        patches = resample(patches, options.grid)
    dtype = DTYPES[options.dtype]
    return Seen(
        origins=[picture.origin for picture in pictures],
        grid=maps.grid,  # type: ignore[arg-type]  # that of one batch
        maps=patches.to(dtype),
        prefix=torch.stack([w[..., : maps.prefix] for w in maps.weights], dim=1).to(dtype),
        artifacts=_artifacts(model, images) if options.outliers else None,
    )


def _on_device(pictures: list[Picture], device: torch.device) -> Tensor:
    """Return the pixels of a batch, uint8 ``(B, H, W, 3)``: a quarter of what floats would be."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # from where the copy runs beside the kernels
    return pixels.to(device, non_blocking=True)


def _artifacts(model: Any, images: Tensor) -> ArtifactTokens:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuspiciousArtifacts)  # the report says it
        found: ArtifactTokens = artifact_tokens(model, images)
    return found
