"""What chosen rows, full matrices and rollouts cost: ratios of calls in the same run.

ViT-S/14 with registers (where the code at hand knows them), float32, batch 1, random weights::

    python benchmarks/rows.py [--quick]
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import warnings
from functools import partial
from typing import Any

import torch
from measure import Call, machine, medians, peak_bytes
from torch import Tensor

import dinov2_attn
from dinov2_attn.attention import attention_weights
from dinov2_attn.upstream import projection
from dinov2_attn.upstream.source import obtain

TOKENS = (1374, 4629)
ROWS = (1, 5, 16, 32, 48, 64, 80, 96, 128)


def break_even(cls: Any, tokens: int, dim: int, rounds: int) -> list[float]:
    """Return for each of ``ROWS`` the time without keys in terms of that with keys."""
    module, x = cls(dim, num_heads=dim // 64, qkv_bias=True).eval(), torch.randn(1, tokens, dim)

    def ask(rows: int, forced: float) -> Tensor:
        projection.BREAK_EVEN = forced
        return module(x, return_attn=True, queries=slice(0, rows))

    before, ratios = projection.BREAK_EVEN, []
    for rows in ROWS:
        calls = {"without": partial(ask, rows, float("inf")), "with": partial(ask, rows, 0)}
        times = medians(calls, rounds=rounds)
        ratios.append(times["without"] / times["with"])
    projection.BREAK_EVEN = before
    return ratios


def matrix(rounds: int) -> dict[str, float]:
    """Return the times of one layer's full matrix, 6 heads, in terms of the bare product."""
    query, key = torch.randn(1, 1374, 2, 6, 64).permute(2, 0, 3, 1, 4)
    calls: dict[str, Call] = {
        "bare `q @ kᵀ`": lambda: query @ key.mT,
        "softmax in two steps": lambda: (query * 0.125 @ key.mT).softmax(-1),
        "ours": lambda: attention_weights(query, key, 0.125),
        "ours, mean of heads": lambda: attention_weights(query, key, 0.125, heads="mean"),
    }
    return _in_terms_of_the_first(medians(calls, rounds=rounds))


def model_calls(model: Any, images: Tensor) -> dict[str, Call]:
    """Return the calls of a whole model that are compared, upstream's own first."""
    ask = {"x": images}
    return {
        "upstream forward": lambda: model.forward_features(images),
        "last block, CLS row": lambda: model.get_last_self_attention(**ask, queries="cls"),
        "last block, full": lambda: model.get_last_self_attention(**ask),
        "all blocks, CLS row": lambda: model.get_self_attention(**ask, queries="cls"),
        "all blocks, full": lambda: model.get_self_attention(**ask),
        "rollout of CLS": lambda: dinov2_attn.rollout(model, images),
        "rollout of CLS, textbook": lambda: textbook(model.get_self_attention(**ask)),
    }


def textbook(layers: tuple[Tensor, ...]) -> Tensor:
    """Return the CLS row of the product of all layers."""
    identity = torch.eye(layers[0].shape[-1])
    product = identity
    for weights in layers:
        product = (weights.mean(1)[0] + identity) / 2 @ product
    return product[None, :1]


def build(size: int) -> Any:
    """Build a ViT-S/14 with parameters of order one: fresh ones attend all but evenly."""
    from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small

    known = inspect.signature(DinoVisionTransformer).parameters
    options = {"num_register_tokens": 4} if "num_register_tokens" in known else {}
    model = vit_small(patch_size=14, img_size=size, init_values=1.0, block_chunks=0, **options)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def table(head: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print a table."""
    for cells in (list(head), ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    print()


def _in_terms_of_the_first(times: dict[str, float]) -> dict[str, float]:
    first = next(iter(times.values()))
    return {name: seconds / first for name, seconds in times.items()}


def _rollout_ratios(ratios: dict[str, float]) -> str:
    ours, theirs = ratios["rollout of CLS"], ratios["rollout of CLS, textbook"]
    beyond = (ours - 1) / (theirs - 1)
    return f"Rollout: {ours / theirs:.2f} × the textbook's, {beyond:.2f} × beyond a forward pass."


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, one size")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(obtain(os.environ.get("DINOV2_ATTN_CHECKOUT")), file=sys.stderr)
    dinov2_attn.install()
    from dinov2.layers.attention import MemEffAttention

    rounds = 3 if arguments.quick else 9
    tokens = TOKENS[: 1 if arguments.quick else 2]
    torch.manual_seed(0)
    print(f"{machine()}\n")
    with torch.no_grad():
        print("Rows without keys in terms of rows with keys:\n")
        cells = [
            [f"{n}, {dim}", *(f"{r:.2f}" for r in break_even(MemEffAttention, n, dim, rounds))]
            for dim in (384, 768)
            for n in tokens
        ]
        table(("tokens, channels", *map(str, ROWS)), cells)
        ratios = matrix(5 * rounds)
        table(("one layer, 1374 tokens", "ratio"), [[k, f"{v:.2f}"] for k, v in ratios.items()])
        images = torch.randn(1, 3, 518, 518)
        calls = model_calls(model := build(518), images)
        difference = (calls["rollout of CLS"]().weights - calls["rollout of CLS, textbook"]()).abs()
        ratios = _in_terms_of_the_first(medians(calls, rounds=rounds))
        table(("ViT-S/14, 518 × 518", "ratio"), [[k, f"{v:.2f}"] for k, v in ratios.items()])
        print(_rollout_ratios(ratios), f"They differ by {difference.max():.1g}.\n")
        images = torch.randn(1, 3, 952, 952)
        calls = model_calls(model, images)
        names = ["upstream forward", "all blocks, CLS row", "last block, full", "rollout of CLS"]
        peaks = [[name, f"{peak_bytes(calls[name]) / 2**20:.0f}"] for name in names]
        table(("952 × 952, memory", "MiB"), peaks)


if __name__ == "__main__":
    main()
