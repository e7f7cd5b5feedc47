"""The attention of the CLS token as pictures, under the file names of DINO v1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov2_attn.errors import Dinov2AttnError, InvalidInput
from dinov2_attn.show.banner import with_banner
from dinov2_attn.show.colours import Grid, Pixels, blend, heaviest, stain, upsample, viridis
from dinov2_attn.show.files import together
from dinov2_attn.show.images import Photograph
from dinov2_attn.upstream.anatomy import count_registers


def cls_maps(model: Any, photograph: Photograph, device: str | torch.device = "cpu") -> Grid:
    """Return what CLS gives to each patch in the last block: float32 (heads, h, w).

    ``model`` is a grafted vision transformer on ``device``. The shares of CLS and of the
    registers are cut off and nothing is rescaled, so that a head sums to less than one.
    Raises ``InvalidInput`` if the device cannot run the model on this many patches.
    """
    weights = _cls_rows(model, photograph.tensor.unsqueeze(0), device)
    prefix = 1 + count_registers(model)
    height, width = (side // model.patch_size for side in photograph.tensor.shape[1:])
    patches = weights[0, :, 0, prefix:].float().cpu()
    maps: Grid = patches.reshape(-1, height, width).numpy()
    return maps


def _cls_rows(model: Any, images: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    try:
        with torch.inference_mode():
            weights: torch.Tensor = model.get_last_self_attention(images.to(device), queries="cls")
    except (RuntimeError, MemoryError) as error:  # no memory on this device, as a rule
        if isinstance(error, Dinov2AttnError):
            raise
        raise InvalidInput(
            "an image that the model can be run on here",
            f"one of {images.shape[2]} × {images.shape[3]} ({str(error).partition(chr(10))[0]})",
            "Give a smaller --image-size.",
        ) from error
    return weights


def draw(
    photograph: Photograph, maps: Grid, patch_size: int, threshold: float | None = None
) -> dict[str, Pixels]:
    """Draw every picture of the ``maps`` (heads, h, w): name to uint8 (H, W, 3).

    ``attn-head{j}`` and ``attn-mean`` in viridis, each from its own least to its own greatest
    value, ``overlay-mean`` half over the photograph and, with a ``threshold`` in (0, 1],
    ``mask_th{t}_head{j}``: the patches that hold that share of the head's mass, in red.
    """
    mean = upsample(viridis(maps.mean(axis=0)), patch_size)
    pictures = {"attn-mean": mean, "overlay-mean": blend(photograph.picture, mean)}
    for head, grid in enumerate(maps):
        pictures[f"attn-head{head}"] = upsample(viridis(grid), patch_size)
        if threshold is not None:
            mask = upsample(heaviest(grid, threshold), patch_size)
            pictures[f"mask_th{threshold}_head{head}"] = stain(photograph.picture, mask)
    return pictures


def write(
    folder: Path,
    photograph: Photograph,
    maps: Grid,
    pictures: dict[str, Pixels],
    warning: str | None = None,
) -> None:
    """Write ``img.png``, ``attention.npy`` and the ``pictures``, all of them or none.

    A ``warning`` goes below every picture of a map. Raises ``UnwritableOutput``.
    """
    with together(folder) as unfinished:
        np.save(unfinished / "attention.npy", maps)
        Image.fromarray(photograph.picture).save(unfinished / "img.png")
        for name, pixels in pictures.items():
            picture = Image.fromarray(pixels)
            if warning is not None:
                picture = with_banner(picture, warning)
            picture.save(unfinished / f"{name}.png")
