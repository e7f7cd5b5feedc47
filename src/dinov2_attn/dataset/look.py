"""The attention of a batch, as it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2_attn.dataset.decode import Origin, Picture
from dinov2_attn.dataset.options import DTYPES, Options
from dinov2_attn.errors import InvalidInput
from dinov2_attn.maps.artifacts import ArtifactTokens, artifacts_on_the_way
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.look import attention_maps, grid_of
from dinov2_attn.maps.resample import resample
from dinov2_attn.queries import spell_out
from dinov2_attn.show.images import normalise
from dinov2_attn.surgery.grafts import weights_from
from dinov2_attn.typing import Grid
from dinov2_attn.upstream.anatomy import count_registers


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
    maps, artifacts = _maps(model, images, options)
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
        artifacts=artifacts,
    )


def _on_device(pictures: list[Picture], device: torch.device) -> Tensor:
    """Return the pixels of a batch, uint8 ``(B, H, W, 3)``: a quarter of what floats would be."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # from where the copy runs beside the kernels
    return pixels.to(device, non_blocking=True)


def _maps(
    model: Any, images: Tensor, options: Options
) -> tuple[AttentionMaps, ArtifactTokens | None]:
    """Return the attention of ``images`` and, where asked for, the artifacts, in one pass."""
    asked: dict[str, Any] = {"queries": options.rows, "heads": options.heads}
    if not options.outliers:
        return attention_maps(model, images, options.layers, **asked), None
    registers = count_registers(model)
    asked["queries"] = spell_out(options.rows, registers)
    weights = {}

    def visit(i: int, block: nn.Module, tokens: Tensor) -> None:
        if i in options.layers:
            weights[i] = weights_from(block, "return_attention", tokens, **asked)

    artifacts = artifacts_on_the_way(model, images, visit)
    each = tuple(weights[layer] for layer in options.layers)
    return AttentionMaps(each, options.layers, grid_of(model, images), 1 + registers), artifacts
