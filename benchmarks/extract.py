"""Images per second of ``extract`` against a loop that only runs upstream's forward.

The loop is given the same batches, decoded and on the device already; ``extract`` reads JPEG
files of four aspect ratios, decodes them in workers, and writes maps. As starting workers takes
seconds once, rates are those of the images beyond the first ones; the start is a row of its own::

    python benchmarks/extract.py [--quick | --large]

A table and ``benchmarks/results/extract.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine
from PIL import Image

import dinov2_attn
from dinov2_attn.apps.extraction.decode import Decoder
from dinov2_attn.apps.extraction.items import list_items
from dinov2_attn.apps.extraction.worker import Buckets
from dinov2_attn.apps.viz.images import normalise
from dinov2_attn.apps.weights.models import build
from dinov2_attn.apps.weights.source import obtain

RESULTS = Path(__file__).parent / "results"
REACH = 0.9

# As photographs come: height and width in pixels, before they are resized.
SIZES = ((375, 500), (500, 375), (500, 500), (333, 500))
BATCH = 8


def photographs(folder: Path, count: int) -> Path:
    """Write ``count`` JPEG files with detail at every scale, of about 50 kB each."""
    draw = np.random.default_rng(0)
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        pixels = np.zeros((height, width, 3))
        for cells in (4, 16, 64, 256):
            coarse = draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize((width, height), 2)) / 4
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=90)
    return folder


def batches(folder: Path, size: int, device: str) -> list[torch.Tensor]:
    """Return the batches that ``extract`` makes of ``folder``, as the model takes them."""
    decoder, buckets, found = Decoder(14, size, None), Buckets(BATCH), []
    for numbered in enumerate(list_items([folder])):
        found += buckets.add(decoder[numbered])
    found += buckets.rest()
    stacked = (np.stack([picture.pixels for picture in batch]) for batch in found)
    return [normalise(torch.from_numpy(pixels).to(device)) for pixels in stacked]


def loop(model: Any, images: list[torch.Tensor]) -> float:
    """Return the seconds of a loop that runs upstream's forward and nothing else."""
    begun = time.perf_counter()
    with torch.inference_mode():
        for batch in images:
            model(batch)
    if images[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def extraction(model: Any, folder: Path, size: int, workers: int, **options: Any) -> float:
    """Return the seconds of extracting ``folder``, into a new one."""
    with tempfile.TemporaryDirectory() as out:
        options = {"image_size": size, "batch_size": BATCH, "workers": workers, **options}
        begun = time.perf_counter()
        dinov2_attn.extract(model, folder, out, shard_size=64, **options)
        return time.perf_counter() - begun


# What is asked, and whether a reach is set for it.
ASKED: dict[str, tuple[dict[str, Any], bool]] = {
    "last block, CLS row": ({}, True),
    "every block, CLS row": ({"layers": None}, False),
    "last block, CLS row, to a grid, float16": ({"grid": (16, 16), "dtype": "float16"}, False),
    "last block, CLS row, outliers": ({"artifacts": True}, False),
}


@dataclass(frozen=True)
class Plan:
    """A size of images, how many of them first and in all, how often, and what is asked."""

    size: int
    counts: tuple[int, int]
    rounds: int
    asked: tuple[str, ...]


# No fewer at first than a worker is started for.
FULL = (Plan(224, (64, 256), 3, tuple(ASKED)),)
LARGE = (Plan(518, (64, 96), 3, tuple(ASKED)[:1]),)
QUICK = (Plan(224, (64, 128), 1, tuple(ASKED)),)


def rows(model: Any, plan: Plan, workers: int) -> list[Any]:
    """Measure extraction, with a round of the loop next to each of its rounds."""
    size, (few, many) = plan.size, plan.counts
    device = str(next(model.parameters()).device)
    found = []
    with tempfile.TemporaryDirectory() as few_in, tempfile.TemporaryDirectory() as many_in:
        short, whole = photographs(Path(few_in), few), photographs(Path(many_in), many)
        images = {len(p): p for p in (batches(short, size, device), batches(whole, size, device))}
        loops = [images[key] for key in sorted(images)]
        loop(model, loops[0])
        for what in plan.asked:
            options, has_reach = ASKED[what]
            ratios, starts, rates = [], [], []
            for _ in range(plan.rounds):
                base = loop(model, loops[1]) - loop(model, loops[0])
                first = extraction(model, short, size, workers, **options)
                beyond = extraction(model, whole, size, workers, **options) - first
                ratios.append(base / beyond)
                rates.append((many - few) / beyond)
                starts.append(max(0.0, first - beyond * few / (many - few)))
            found.append(
                {
                    "what": what,
                    "image": size,
                    "rate": statistics.median(rates),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                    "start": statistics.median(starts),
                    "reach": REACH if has_reach else None,
                }
            )
            print(found[-1], file=sys.stderr)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| what | image | images/s | of the loop's | start | reach |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        reach = "" if row["reach"] is None else f"≥ {row['reach']}"
        missed = "MISSED: " * (row["reach"] is not None and row["ratio"] < row["reach"])
        lines.append(
            f"| {row['what']} | vit_small, {row['image']} | {row['rate']:.1f} | "
            f"{row['ratio']:.2f} × | {row['start']:.1f} s | {missed}{reach} |"
        )
    return "\n".join(lines)


def conditions(plans: tuple[Plan, ...], workers: int) -> str:
    """Say what rates were measured on, and how."""
    return (
        f"{machine()}, {workers} workers, ViT-S/14 in float32, batches "
        f"of up to {BATCH}, JPEG files of {', '.join(f'{h} × {w}' for h, w in SIZES)}; the short "
        "side resized to what the table says.\nRates are those of the images beyond the first "
        "ones, medians of "
        + ", ".join(f"{plan.rounds} rounds at {plan.size}" for plan in plans)
        + "; the loop "
        "is timed in each round, right before."
    )


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images, one round, not written")
    parser.add_argument("--large", action="store_true", help="images of 518, not written")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.modules.setdefault("xformers", None)  # type: ignore[arg-type]
    print(obtain(os.environ.get("DINOV2_ATTN_CHECKOUT")), file=sys.stderr)
    dinov2_attn.install()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build("vit_small").to(device)
    plans = QUICK if arguments.quick else LARGE if arguments.large else FULL
    found = [row for plan in plans for row in rows(model, plan, arguments.workers)]
    text = f"{table(found)}\n\n{conditions(plans, arguments.workers)}\n"
    print(text)
    if plans is FULL:
        (RESULTS / "extract.md").write_text(text)
        (RESULTS / "extract.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
