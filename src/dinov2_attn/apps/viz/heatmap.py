"""The attention of the CLS token as PNG files, with the file names of DINO v1."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dinov2_attn._files import atomic_folder
from dinov2_attn.apps.viz.colours import Grid, Pixels, blend, top_mass_mask, upsample, viridis
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.apps.viz.inference import inference_on
from dinov2_attn.apps.viz.pixels import dimmed, greyed
from dinov2_attn.apps.viz.provenance import RECORD, Facts, metadata_for, write_record
from dinov2_attn.apps.viz.text import with_banner
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.one_batch import attention_maps
from dinov2_attn.typing import Layers, Queries

Device = str | torch.device
Writer = Callable[[Path], object]


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
    return last_maps(maps_of(model, image, 1, "cls", device))


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


def last_maps(maps: AttentionMaps, row: int = 0) -> Grid:
    """Return the maps ``(heads, h, w)`` of one row of the queries, in the last of the layers."""
    patches: Grid = maps.patch_maps()[-1][0, :, row].float().numpy()
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
        uint8 ``(H, W, 3)`` by DINO v1's names: ``attn-head{j}`` and ``attn-mean`` in viridis, each
        from its own minimum to its own maximum; ``overlay-mean``, blended half and half with the
        image in grey; and with a ``threshold`` ``mask_th{t}_head{j}``, which dims the image but for
        the patches that hold this share of the head's mass.

    """
    mean = upsample(viridis(maps.mean(axis=0)), patch_size)
    pictures = {"attn-mean": mean, "overlay-mean": blend(greyed(image.picture), mean)}
    for head, grid in enumerate(maps):
        pictures[f"attn-head{head}"] = upsample(viridis(grid), patch_size)
        if threshold is not None:
            kept = top_mass_mask(grid, threshold)
            pictures[f"mask_th{threshold}_head{head}"] = dimmed(image.picture, kept)
    return pictures


def image_files(image: LoadedImage) -> dict[str, Writer]:
    """Return how to write ``img.png``, and ``image.json`` if the image was read from a file."""
    files: dict[str, Writer] = {"img.png": Image.fromarray(image.picture).save}
    if metadata := image.metadata():
        files["image.json"] = partial(_write_text, text=json.dumps(metadata, indent=1) + "\n")
    return files


def map_files(
    maps: Grid,
    pictures: Mapping[str, Pixels],
    *,
    suffix: str = "",
    warning: str | None = None,
    facts: Facts | None = None,
) -> dict[str, Writer]:
    """Return how to write ``attention.npy`` and the ``pictures``, by file name.

    Args:
        maps: ``(heads, h, w)``.
        pictures: uint8 ``(H, W, 3)`` by name, as ``draw`` returns them.
        suffix: What names end in, before the dot. Empty for CLS, as in DINO v1.
        warning: A line below every picture.
        facts: What the metadata of every picture say.

    """
    files: dict[str, Writer] = {f"attention{suffix}.npy": lambda path: np.save(path, maps)}
    for name, pixels in pictures.items():
        files[f"{name}{suffix}.png"] = partial(_write_map, pixels, warning, facts or {})
    return files


def write(
    folder: Path,
    files: Mapping[str, Writer],
    without: Iterable[str] = (),
    record: Facts | None = None,
) -> None:
    """Write ``files`` into ``folder``, all of them or none.

    Args:
        folder: The destination. It is created if it does not exist.
        files: A function for each name, which writes to the path that it gets.
        without: The names of files that are removed from ``folder`` in the same moment.
        record: What ``run.json`` says of this run. ``None`` writes none.

    Raises:
        UnwritableOutputError: if a file cannot be written.

    """
    with atomic_folder(folder, without) as unfinished:
        for name, write_to in files.items():
            write_to(unfinished / name)
        if record is not None:
            write_record(unfinished / RECORD, record, unfinished.iterdir())


def _write_map(pixels: Pixels, warning: str | None, facts: Facts, path: Path) -> None:
    picture = Image.fromarray(pixels)
    if warning is not None:
        picture = with_banner(picture, warning)
    words = PngInfo()
    for key, text in metadata_for("png", facts).items():
        words.add_text(key, text)
    picture.save(path, pnginfo=words)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
