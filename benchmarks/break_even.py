"""From how many rows on keys are worth their projection: the ways are timed by themselves.

Where the times are equal the ratio is 1; ``projection.BREAK_EVEN`` comes from here::

    python benchmarks/break_even.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from functools import partial
from typing import Any

import torch
from measure import machine, ratios
from torch import Tensor

import dinov2_attn
from dinov2_attn.apps.weights.source import obtain
from dinov2_attn.backbone import projection

TOKENS = (1374, 4629)
ROWS = (1, 5, 16, 32, 48, 64, 80, 96, 128)


def break_even(cls: Any, tokens: int, dim: int, rounds: int) -> list[float]:
    """Return for each of ``ROWS`` the time without keys in terms of that with keys."""
    module, x = cls(dim, num_heads=dim // 64, qkv_bias=True).eval(), torch.randn(1, tokens, dim)

    def ask(rows: int, forced: float) -> Tensor:
        projection.BREAK_EVEN = forced
        return module(x, return_attn=True, queries=slice(0, rows))

    before, found = projection.BREAK_EVEN, []
    for rows in ROWS:
        without = {"without": partial(ask, rows, float("inf"))}
        found.append(ratios(partial(ask, rows, 0), without, rounds=rounds)["without"])
    projection.BREAK_EVEN = before
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, one size")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(obtain(os.environ.get("DINOV2_ATTN_CHECKOUT")), file=sys.stderr)
    dinov2_attn.install()
    from dinov2.layers.attention import MemEffAttention

    rounds = 3 if arguments.quick else 9
    print(f"Rows without keys in terms of rows with keys; {machine()}\n")
    print(f"| tokens, channels | {' | '.join(map(str, ROWS))} |")
    print(f"|{'---|' * (len(ROWS) + 1)}")
    with torch.no_grad():
        for dim in (384, 768):
            for tokens in TOKENS[: 1 if arguments.quick else 2]:
                found = break_even(MemEffAttention, tokens, dim, rounds)
                print(f"| {tokens}, {dim} | {' | '.join(f'{r:.2f}' for r in found)} |")


if __name__ == "__main__":
    main()
