"""The attention of the CLS token as pictures, under the file names of DINO v1."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov2_attn.apps.viz.banner import with_banner
from dinov2_attn.apps.viz.colours import Grid, Pixels, blend, heaviest, stain, upsample, viridis
from dinov2_attn.apps.viz.folders import together
from dinov2_attn.apps.viz.images import Photograph
from dinov2_attn.apps.viz.inference import looking_at
from dinov2_attn.maps.attention_maps import AttentionMaps, attention_maps
from dinov2_attn.typing import Layers, Queries

Device = str | torch.device


def cls_maps(model: Any, photograph: Photograph, device: Device = "cpu") -> Grid:
    """Return what CLS gives to each patch in the last block: float32 (heads, h, w).

    ``model`` is a grafted vision transformer on ``device``. The shares of CLS and of the
    registers are cut off and nothing is rescaled, so that a head sums to less than one.
    Raises ``InvalidInputError`` if the device cannot run the model on this many patches.
    """
    return last_cls_maps(maps_of(model, photograph, 1, "cls", device))


def maps_of(
    model: Any,
    photograph: Photograph,
    layers: Layers = None,
    queries: Queries = None,
    device: Device = "cpu",
) -> AttentionMaps:
    """Return ``attention_maps`` of one photograph, on the CPU; errors are those of ``cls_maps``."""
    maps: AttentionMaps = run(
        lambda images: attention_maps(model, images, layers, queries=queries), photograph, device
    )
    return maps


def last_cls_maps(maps: AttentionMaps) -> Grid:
    """Return the maps (heads, h, w) of CLS in the last of the layers, CLS being the first query."""
    patches: Grid = maps.patch_maps()[-1][0, :, 0].float().numpy()
    return patches


def run(compute: Callable[[torch.Tensor], Any], photograph: Photograph, device: Device) -> Any:
    """Return what ``compute`` makes of a batch of one photograph, its tensors on the CPU."""
    images = photograph.tensor.unsqueeze(0)
    with looking_at(images):
        return compute(images.to(device)).cpu()


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
    others: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write ``img.png``, ``attention.npy`` and the ``pictures``, all of them or none.

    ``image.json`` says how the photograph was read, if it was read from a file. A
    ``warning`` goes below every picture of a map. ``others`` are files by name, with what writes
    them. Raises ``UnwritableOutputError``.
    """
    with together(folder) as unfinished:
        np.save(unfinished / "attention.npy", maps)
        if about := photograph.about():
            (unfinished / "image.json").write_text(json.dumps(about, indent=1) + "\n")
        Image.fromarray(photograph.picture).save(unfinished / "img.png")
        for name, pixels in pictures.items():
            picture = Image.fromarray(pixels)
            if warning is not None:
                picture = with_banner(picture, warning)
            picture.save(unfinished / f"{name}.png")
        for name, write_to in (others or {}).items():
            write_to(unfinished / name)
