"""Weights of nested crops against the dense mask: Σ n² and (Σ n)².

DINOv2's recipe: 2 crops of 224 and 8 of 98 pixels, ViT-S/14, in one list. Real xFormers masks
on upstream's own classes::

    python benchmarks/nested.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measure import machine, medians, peak_bytes

import dinov2_attn
from dinov2_attn.apps.weights.source import obtain

DIM, HEADS, PATCH = 384, 6, 14
CROPS = ((2, 224), (8, 98))

# Beyond this the dense matrix, its mask and its softmax outgrow a workstation.
LARGEST_DENSE = 4


def crops(batch: int, device: str) -> list[torch.Tensor]:
    """Return the tokens ``(views · batch, n, C)`` of each kind of crop."""
    return [
        torch.randn(views * batch, 1 + (size // PATCH) ** 2, DIM, device=device)
        for views, size in CROPS
    ]


def weights_bytes(tokens: list[torch.Tensor]) -> int:
    """Return the bytes of the weights themselves."""
    return sum(len(x) * HEADS * x.shape[1] ** 2 * x.element_size() for x in tokens)


def dense(module: Any, together: torch.Tensor, bias: Any) -> list[torch.Tensor]:
    """Return the same weights by way of the dense mask, as one would write it by hand."""
    length = together.shape[1]
    qkv = module.qkv(together).reshape(1, length, 3, HEADS, DIM // HEADS)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    mask = bias.materialize((1, 1, length, length), device=together.device)
    whole = (query @ key.mT * module.scale + mask).softmax(-1)
    blocks = [whole[0, :, a:b, a:b] for a, b in bias.q_seqinfo.intervals()]
    done, result = 0, []
    for size in bias._batch_sizes:
        result.append(torch.stack(blocks[done : done + size]))
        done += size
    return result


def row(module: Any, nest: Callable[..., Any], batch: int, device: str, rounds: int) -> str:
    """Measure one batch size and return its line of the table."""
    tokens = crops(batch, device)
    bias, together = nest(tokens)
    size = weights_bytes(tokens)
    calls = {"ours": lambda: module(together, attn_bias=bias, return_attn=True)}
    if batch <= LARGEST_DENSE:
        calls["dense"] = lambda: dense(module, together, bias)
        for a, b in zip(calls["ours"](), calls["dense"](), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    peaks = {name: peak_bytes(call) / size for name, call in calls.items()}
    times = medians(calls, rounds=rounds)
    cells = [f"{batch}", f"{size / 1e6:.1f} MB", f"{peaks['ours']:.2f}"]
    cells += [f"{peaks['dense']:.1f}" if "dense" in peaks else "not run"]
    cells += [f"{times['ours'] / size * 1e9:.2f} ns"]
    cells += [f"{times['dense'] / times['ours']:.1f} ×" if "dense" in times else "not run"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(obtain(os.environ.get("DINOV2_ATTN_CHECKOUT")), file=sys.stderr)
    dinov2_attn.install()
    from dinov2.layers.attention import MemEffAttention
    from dinov2.layers.block import get_attn_bias_and_cat

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = MemEffAttention(DIM, num_heads=HEADS, qkv_bias=True).to(device).eval()
    batches, rounds = ((1, 2), 3) if arguments.quick else ((1, 2, 4, 8, 16), 9)
    print(f"2 × 224 + 8 × 98 crops, ViT-S/14, float32; {machine()}\n")
    print("| batch | weights | peak, ours | peak, dense mask | time per byte | dense mask |")
    print("|---|---|---|---|---|---|")
    with torch.no_grad():
        for batch in batches:
            print(row(module, get_attn_bias_and_cat, batch, device, rounds))
    print("\nPeaks in bytes of the weights themselves, projection included.")


if __name__ == "__main__":
    main()
