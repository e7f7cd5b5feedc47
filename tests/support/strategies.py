"""What hypothesis draws: attention modules, blocks and models of real upstream classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.upstreams import Upstream

seeds = st.integers(0, 2**16)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def _half_products_run() -> bool:
    try:
        torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2, dtype=torch.float16)
    except RuntimeError:
        return False
    return True


# Old torch has no float16 product on the CPU, upstream's own forward included; bfloat16 remains.
if not _half_products_run():
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def randomise(module: Any, seed: int) -> Any:
    """Parameters of order one: freshly built modules attend all but evenly, which hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return module.eval()


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class AttentionCase:
    """One attention module and tokens for it, as numbers, so that failures print well."""

    which: int
    heads: int
    head_dim: int
    batch: int
    length: int
    qkv_bias: bool
    dtype: torch.dtype
    seed: int

    def build(self, upstream: Upstream) -> tuple[Any, Tensor]:
        cls, dim = upstream.attentions[self.which], self.heads * self.head_dim
        module = cls(dim, num_heads=self.heads, qkv_bias=self.qkv_bias).double()
        tokens = noise(self.batch, self.length, dim, seed=self.seed, dtype=self.dtype)
        return randomise(module, self.seed).to(self.dtype), tokens


def attention_cases(dtype: st.SearchStrategy[torch.dtype] = dtypes) -> Any:
    return st.builds(
        AttentionCase,
        which=st.integers(0, 1),
        heads=st.integers(1, 4),
        head_dim=st.integers(1, 9),
        batch=st.integers(1, 3),
        length=st.integers(1, 17),
        qkv_bias=st.booleans(),
        dtype=dtype,
        seed=seeds,
    )


@dataclass(frozen=True)
class ModelCase:
    """One vision transformer and images for it."""

    depth: int
    chunks: int
    registers: int
    heads: int
    grid: tuple[int, int]
    batch: int
    dtype: torch.dtype
    seed: int

    patch = 2

    def build(self, upstream: Upstream, *, chunks: int | None = None, **options: Any) -> Any:
        if upstream.has_registers:
            options["num_register_tokens"] = self.registers
        model = upstream.cls("DinoVisionTransformer")(
            img_size=4 * self.patch,
            patch_size=self.patch,
            embed_dim=4 * self.heads,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=2,
            init_values=1.0,
            block_fn=partial(
                upstream.cls("NestedTensorBlock"), attn_class=upstream.cls("MemEffAttention")
            ),
            block_chunks=self.chunks if chunks is None else chunks,
            **options,
        )
        return randomise(model.double(), self.seed).to(self.dtype)

    def prefix(self, upstream: Upstream) -> int:
        return 1 + (self.registers if upstream.has_registers else 0)

    @property
    def images(self) -> Tensor:
        height, width = self.grid
        shape = (self.batch, 3, height * self.patch, width * self.patch)
        return noise(*shape, seed=self.seed, dtype=self.dtype)

    @property
    def masks(self) -> Tensor:
        return noise(self.batch, self.grid[0] * self.grid[1], seed=self.seed + 1) > 0


def model_cases(dtype: st.SearchStrategy[torch.dtype] | None = None) -> Any:
    # Images are interpolated and convolved: upstream runs in these two anywhere.
    dtypes_of_models = st.sampled_from([torch.float32, torch.float64]) if dtype is None else dtype
    depths_and_chunks = st.sampled_from([(1, 0), (2, 0), (3, 0), (2, 1), (2, 2), (4, 2), (3, 3)])
    return depths_and_chunks.flatmap(
        lambda pair: st.builds(
            ModelCase,
            depth=st.just(pair[0]),
            chunks=st.just(pair[1]),
            registers=st.integers(0, 4),
            heads=st.integers(1, 3),
            grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
            batch=st.integers(1, 3),
            dtype=dtypes_of_models,
            seed=seeds,
        )
    )
