"""The cost of attention on a GPU, beside what its memory bandwidth allows.

    python benchmarks/cuda.py [--repo CHECKOUT] [--out FOLDER]

writes ``cuda.md``. A full matrix is written once at least. So its bytes, divided by the rate at
which this GPU writes, are the limit of each row of full matrices.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import machine, peak_bytes, ratios
from peers import Size, upstream

import dinov2_attn
from dinov2_attn.apps.weights.source import obtain

LARGE = Size("vit_large", 1024, 16, depth=24)
CASES = [(LARGE, 518, torch.bfloat16), (LARGE, 952, torch.bfloat16), (LARGE, 518, torch.float32)]
GIBI = 2**30


def milliseconds(call: Callable[[], object], rounds: int = 10) -> float:
    """Return the median time of ``call``, by the GPU's own clock."""
    call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        times.append(start.elapsed_time(end))
    return sorted(times)[rounds // 2]


def written_per_second() -> float:
    """Return how many bytes this GPU writes in a second, filling 2 GiB."""
    block = torch.empty(2 * GIBI, dtype=torch.uint8, device="cuda")
    return 2 * GIBI / milliseconds(lambda: block.fill_(1)) * 1e3


def ours(model: Any, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return what is asked of a model."""

    def record(**selection: Any) -> object:
        with dinov2_attn.record(model, **selection) as maps:
            model(images)
        return maps

    to_mean = partial(record, reduce=lambda layer, weights: weights.mean(1))
    return {
        "grafted, not asked": lambda: model(images),
        "last block, CLS row": lambda: model.get_last_self_attention(images, queries="cls"),
        "last block, full": lambda: model.get_last_self_attention(images),
        "every block, CLS row": partial(record, queries="cls"),
        'every block, CLS row, check="every"': partial(record, queries="cls", check="every"),
        "every block, full, kept": record,
        'every block, full, kept, features="from_weights"': partial(
            record, features="from_weights"
        ),
        'every block, full, kept, device="cpu"': partial(record, device="cpu"),
        "every block, full, reduced to .cpu()": partial(record, reduce=lambda _, w: w.cpu()),
        "every block, entropy and distance, no weights": partial(
            record, queries=[], statistics=("entropy", "distance")
        ),
        'every block, heads="mean"': partial(record, heads="mean"),
        "every block, reduced to the head mean": to_mean,
    }


def case(size: Size, image: int, dtype: torch.dtype, rate: float) -> list[str]:
    """Return the lines of the table for one model and image."""
    model = upstream(size, image).to("cuda", dtype)
    images = torch.randn(1, 3, image, image, device="cuda", dtype=dtype)
    length = 1 + size.registers + (image // size.patch) ** 2
    matrix = size.heads * length**2 * dtype.itemsize
    calls = ours(model, images)
    found = ratios(lambda: model(images), calls, rounds=15)
    forward = milliseconds(lambda: model(images))
    limit = size.depth * matrix / rate * 1e3
    extra = peak_bytes(calls["every block, CLS row"]) - peak_bytes(lambda: model(images))
    name = f"{size.arch}, {image}, {str(dtype).removeprefix('torch.')}"
    lines = [f"| {name} | upstream's forward | {forward:.2f} ms |  |"]
    for what, ratio in found.items():
        share = ""
        if "full, kept" in what:
            share = f"{limit / ((ratio - 1) * forward):.0%}"
        lines.append(f"| {name} | {what} | {ratio:.2f} × forward | {share} |")
    written = f"{size.depth * matrix / GIBI:.2f} GiB in {limit:.2f} ms at least"
    lines.append(f"| {name} | matrices of all blocks | {written} |  |")
    return [*lines, f"| {name} | CLS row, extra memory | {extra / 2**20:.1f} MiB |  |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", metavar="PATH", help="a checkout of facebookresearch/dinov2")
    parser.add_argument("--out", metavar="FOLDER", default="benchmarks/results", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device; found none. benchmarks/cost.py measures CPUs.")
    warnings.simplefilter("ignore")
    print(obtain(arguments.repo), file=sys.stderr)
    dinov2_attn.install()
    rate = written_per_second()
    lines = [
        f"{machine()}. It writes {rate / GIBI:.0f} GiB in a second.",
        "",
        "| model, image, dtype | what | measured | share of the bandwidth limit |",
        "|---|---|---|---|",
    ]
    with torch.no_grad():
        for size, image, dtype in CASES:
            lines += case(size, image, dtype, rate)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cuda.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
