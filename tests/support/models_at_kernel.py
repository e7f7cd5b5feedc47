"""Upstream's transformer with an attention that its projection alone does not decide."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from tests.support.strategies import randomise


def normalised(upstream, *, bias=False, causal=False):
    """Queries and keys are normalised between projection and kernel, as in UNIC."""

    class Normalised(upstream.cls("Attention")):
        def forward(self, x, attn_bias=None):
            length, channels = x.shape[1:]
            split = self.qkv(x).unflatten(-1, (3, self.num_heads, channels // self.num_heads))
            q, k, v = split.permute(2, 0, 3, 1, 4)
            if bias:
                far = torch.arange(length, dtype=x.dtype)
                attn_bias = -(far[:, None] - far).abs() / 3
            q, k = F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1) * 2
            x = F.scaled_dot_product_attention(q, k, v, attn_bias, is_causal=causal)
            return self.proj(x.transpose(1, 2).flatten(2))

    return Normalised


def build(upstream, dtype=torch.float64, *, depth=3, registers=0, **options):
    attention = normalised(upstream, **options)
    extra = {"num_register_tokens": registers} if registers else {}
    model = upstream.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=24, depth=depth, num_heads=2, block_chunks=0,
        **extra, block_fn=partial(upstream.cls("Block"), attn_class=attention),
    )  # fmt: skip
    return randomise(model.double(), 1).to(dtype)
