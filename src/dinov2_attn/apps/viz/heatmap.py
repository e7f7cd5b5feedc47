"""The attention of the CLS token as PNG files, with the file names of DINO v1."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov2_attn._files import atomic_folder
from dinov2_attn.apps.viz.colours import Grid, Pixels, blend, top_mass_mask, upsample, viridis
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.apps.viz.inference import inference_on
from dinov2_attn.apps.viz.pixels import dimmed, greyed
from dinov2_attn.apps.viz.text import with_banner
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.one_batch import attention_maps
from dinov2_attn.typing import Layers, Queries

Device = str | torch.device


def cls_maps(model: Any, image: LoadedImage, device: Device = "cpu") -> Grid:
    """Return the attention of CLS to each patch in the last block: float32 ``(heads, h, w)``.

    CLS and the registers are left out and nothing is rescaled: a head sums to less than one.

    Args:
        model: A grafted vision transformer on ``device``.
        image: What ``load_image`` returned.
        device: Where to run the model.

    Raises:
        InvalidInputError: if the model cannot be run on this image.

    """
    return last_cls_maps(maps_of(model, image, 1, "cls", device))


def maps_of(
    model: Any,
    image: LoadedImage,
    layers: Layers = None,
    queries: Queries = None,
    device: Device = "cpu",
) -> AttentionMaps:
    """Return the ``attention_maps`` of one image on the CPU. Raise as ``cls_maps`` does."""
    maps: AttentionMaps = run(
        lambda images: attention_maps(model, images, layers, queries=queries), image, device
    )
    return maps


def last_cls_maps(maps: AttentionMaps) -> Grid:
    """Return the maps ``(heads, h, w)`` of the first query, CLS, in the last of the layers."""
    patches: Grid = maps.patch_maps()[-1][0, :, 0].float().numpy()
    return patches


def run(compute: Callable[[torch.Tensor], Any], image: LoadedImage, device: Device) -> Any:
    """Return on the CPU what ``compute`` returns for a batch of one image on ``device``."""
    images = image.tensor.unsqueeze(0)
    with inference_on(images):
        return compute(images.to(device)).cpu()


def draw(
    image: LoadedImage, maps: Grid, patch_size: int, threshold: float | None = None
) -> dict[str, Pixels]:
    """Draw every picture of the ``maps``.

    Args:
        image: The image of the maps.
        maps: What ``cls_maps`` returned, ``(heads, h, w)``.
        patch_size: The side of a patch in pixels.
        threshold: A share of the mass in (0, 1], or ``None`` for no masks.

    Returns:
        uint8 ``(H, W, 3)`` by name: ``attn-head{j}`` and ``attn-mean`` in viridis, each from its
        own minimum to its own maximum; ``overlay-mean``, blended half and half with the image in
        grey; and with a ``threshold`` ``mask_th{t}_head{j}``, which dims the image but for the
        patches that hold this share of the head's mass.

    """
    mean = upsample(viridis(maps.mean(axis=0)), patch_size)
    pictures = {"attn-mean": mean, "overlay-mean": blend(greyed(image.picture), mean)}
    for head, grid in enumerate(maps):
        pictures[f"attn-head{head}"] = upsample(viridis(grid), patch_size)
        if threshold is not None:
            kept = top_mass_mask(grid, threshold)
            pictures[f"mask_th{threshold}_head{head}"] = dimmed(image.picture, kept)
    return pictures


def write(
    folder: Path,
    image: LoadedImage,
    maps: Grid,
    pictures: dict[str, Pixels],
    warning: str | None = None,
    others: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write ``img.png``, ``attention.npy`` and the ``pictures``, all of them or none.

    ``image.json`` says how the image was read, if it was read from a file.

    Args:
        folder: The destination. It is created if it does not exist.
        image: The image of the maps.
        maps: ``(heads, h, w)``.
        pictures: uint8 ``(H, W, 3)`` by name, as ``draw`` returns them.
        warning: A line below every picture of a map.
        others: More files: a function for each name, which writes to the path that it gets.

    Raises:
        UnwritableOutputError: if a file cannot be written.

    """
    with atomic_folder(folder) as unfinished:
        np.save(unfinished / "attention.npy", maps)
        if metadata := image.metadata():
            (unfinished / "image.json").write_text(json.dumps(metadata, indent=1) + "\n")
        Image.fromarray(image.picture).save(unfinished / "img.png")
        for name, pixels in pictures.items():
            picture = Image.fromarray(pixels)
            if warning is not None:
                picture = with_banner(picture, warning)
            picture.save(unfinished / f"{name}.png")
        for name, write_to in (others or {}).items():
            write_to(unfinished / name)
