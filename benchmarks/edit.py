"""What an edit costs, as a ratio to the same pass without one.

python benchmarks/edit.py [SIDE]

A ViT-S/14 with registers of timm on random images of SIDE (518) pixels, one thread, processor time,
the best of five rounds that take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch

from dinov2_attn import edit

REGISTERS = [1, 2, 3, 4]


def edits(model: Any) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    return {
        "no edit": nullcontext,
        "two heads of each layer ablated": lambda: edit(model, heads=[0, 2]),
        "registers hidden from CLS, each layer": lambda: edit(model, keys=REGISTERS, queries="cls"),
        "registers hidden from all tokens, each layer": lambda: edit(model, keys=REGISTERS),
        "a function of the CLS row, each layer": lambda: edit(
            model, weights=lambda _, weights: weights, queries="cls"
        ),
        "a function of one layer": lambda: edit(model, [11], weights=lambda _, weights: weights),
        "a function of each layer": lambda: edit(model, weights=lambda _, weights: weights),
    }


@torch.inference_mode()
def main(side: int = 518) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=side).eval()
    images = torch.randn(1, 3, side, side)
    spent: dict[str, list[float]] = {}
    for _ in range(5):
        for name, context in edits(model).items():
            with context():
                start = time.process_time()
                model(images)
                spent.setdefault(name, []).append(time.process_time() - start)
    base = min(spent["no edit"])
    print("| edit | ratio |\n|---|---|")
    for name, seconds in spent.items():
        print(f"| {name} | {min(seconds) / base:.2f} × |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
