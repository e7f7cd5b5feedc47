"""Images in a second and bytes for each image, to plan a large extraction.

    python benchmarks/scale.py [--repo CHECKOUT] [--out FOLDER] [--limit SECONDS]

writes ``scale-cpu.md`` or ``scale-cuda.md``. Images in a second are measured on random images that
are in memory: nothing is decoded or written. Where one pass would take longer than the limit, they
are computed from the last cell of the same kind that was measured, by the operations of both, and
marked with ``≈``. Bytes are computed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import machine
from peers import BASE, SMALL, Size, upstream

import dinov2_attn
from dinov2_attn.apps.weights.source import obtain

SIZES = (
    SMALL,
    BASE,
    Size("vit_large", 1024, 16, depth=24),
    Size("vit_giant2", 1536, 24, depth=40),
)
IMAGES = (224, 518, 952)
KINDS = ("forward", "CLS rows", "entropy, distance", "matrices")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Images in a batch: few, so that matrices of a layer fit beside a large model.
BATCHES = {224: 32, 518: 8, 952: 2} if DEVICE == "cuda" else {224: 4, 518: 1, 952: 1}
FIGURES = 3


def tokens(size: Size, image: int) -> int:
    """Return the number of tokens N."""
    return 1 + size.registers + (image // size.patch) ** 2


def operations(size: Size, image: int, kind: str) -> float:
    """Return about how many multiplications one image takes: projections, MLP and attention."""
    n, d = tokens(size, image), size.dim
    again = {"forward": 0, "CLS rows": 0, "entropy, distance": 1, "matrices": 1}[kind]
    return size.depth * (12 * n * d**2 + (2 + again) * n**2 * d)


def kept_bytes(size: Size, image: int) -> dict[str, int]:
    """Return what ``extract`` stores of one image, of all layers and heads, in bytes."""
    n, heads = tokens(size, image), size.depth * size.heads
    return {
        "CLS rows": heads * n * 2,
        "entropy, distance": heads * n * 2 * 4,
        "matrices": heads * n * n * 2,
    }


def calls_of(model: Any) -> dict[str, Callable[[torch.Tensor], object]]:
    """Return what is measured. No matrix outlives its layer."""

    def record(images: torch.Tensor, **selection: Any) -> object:
        with dinov2_attn.record(model, **selection) as maps:
            model(images)
        return maps

    return {
        "forward": model,
        "CLS rows": partial(record, queries="cls"),
        "entropy, distance": partial(record, queries=[], statistics=("entropy", "distance")),
        "matrices": partial(record, reduce=lambda layer, weights: None),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return the median time of a few calls, after one that proves its layers."""
    call()
    return statistics.median(timed(call) for _ in range(FIGURES))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rates(limit: float) -> dict[tuple[str, int, str], tuple[float, bool]]:
    """Return images in a second of each model, image and kind, and whether they were measured."""
    found: dict[tuple[str, int, str], tuple[float, bool]] = {}
    last: dict[str, float] = {}  # of each kind the operations in a second
    for size in SIZES:
        with torch.device(DEVICE):
            model = upstream(size, 518).to(DTYPE)
        for image in IMAGES:
            batch = torch.randn(BATCHES[image], 3, image, image, device=DEVICE, dtype=DTYPE)
            for kind, call in calls_of(model).items():
                work = operations(size, image, kind)
                measured = len(batch) * work <= limit * last.get(kind, math.inf)
                if measured:
                    last[kind] = len(batch) * work / seconds(partial(call, batch))
                found[size.arch, image, kind] = (last[kind] / work, measured)
                print(size.arch, image, kind, found[size.arch, image, kind], file=sys.stderr)
    return found


def table(found: dict[tuple[str, int, str], tuple[float, bool]]) -> str:
    """Return the rows as Markdown."""
    kept = [kind for kind in KINDS if kind != "forward"]
    head = ["model, image", "tokens", *(f"{kind}, images/s" for kind in KINDS), *kept]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for size in SIZES:
        for image in IMAGES:
            each = [found[size.arch, image, kind] for kind in KINDS]
            speeds = [f"{'' if measured else '≈ '}{_number(rate)}" for rate, measured in each]
            sizes = [_size(kept_bytes(size, image)[kind]) for kind in kept]
            cells = [f"{size.arch}, {image}", str(tokens(size, image)), *speeds, *sizes]
            lines.append(f"| {' | '.join(cells)} |")
    batches = ", ".join(f"{BATCHES[image]} at {image}" for image in IMAGES)
    about = f"{machine()}, {str(DTYPE).removeprefix('torch.')}, images in a batch: {batches}."
    return "\n".join([*lines, "", about])


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.{2 if rate < 1 else 1}f}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", metavar="PATH", help="a checkout of facebookresearch/dinov2")
    parser.add_argument("--out", metavar="FOLDER", default="benchmarks/results", type=Path)
    parser.add_argument("--limit", metavar="SECONDS", default=30.0, type=float)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(obtain(arguments.repo), file=sys.stderr)
    dinov2_attn.install()
    with torch.no_grad():
        text = table(rates(arguments.limit))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"scale-{DEVICE}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
