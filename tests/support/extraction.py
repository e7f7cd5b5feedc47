"""Images to extract from, a model to do it with, and what an output folder holds."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image
from safetensors import safe_open

from tests.support.strategies import randomise

SIZES = [(4, 4), (4, 10), (10, 4), (6, 6), (7, 5)]  # the last one is cropped to (6, 4)


def build(upstream, **options):
    """A small model of patches of 2 × 2, on whose maps every image leaves its own."""
    options = {"depth": 3, "block_chunks": 0, "embed_dim": 8, "num_heads": 2, **options}
    model = upstream.cls("DinoVisionTransformer")(img_size=4, patch_size=2, **options)
    return randomise(model, 1)


def draw(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def photographs(folder, count=12):
    """Images of several sizes, some of them in folders."""
    for i in range(count):
        draw(folder / ["", "b", "a/deep"][i % 3] / f"{i:03}.png", SIZES[i % len(SIZES)], i)
    return folder


def files_of(folder):
    """Every file below ``folder`` with its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def index_of(folder, name="index.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def stored(folder):
    """Each image's entry with its maps and prefix, read without this package."""
    for entry in index_of(folder):
        with safe_open(folder / entry["shard"], "pt") as shard:
            yield (
                entry,
                *(shard.get_tensor(f"{entry['number']}.{part}") for part in ("maps", "prefix")),
            )
