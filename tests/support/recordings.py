"""Models to record, and what is asked of every recording."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from dinov2_attn.grafting.channel import ACTIVE, STATE
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close

IMAGES = noise(2, 3, 4, 6, seed=0, dtype=torch.float64)
N = 1 + 2 * 3


def build(upstream, **options):
    options = {"depth": 3, "block_chunks": 0, **options}
    model = upstream.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=8, num_heads=2, **options
    )
    for parameter in model.parameters():
        parameter.requires_grad_()  # RoMa freezes its copy
    return randomise(model.double(), 1)


class Adapted(nn.Linear):
    """LoRA's way: a projection of another class around the one that was there."""

    def __init__(self, inner):
        super().__init__(inner.in_features, inner.out_features, dtype=torch.float64)
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + super().forward(x)


class Around(nn.Module):
    """A wrapper that passes no keywords on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def assert_nothing_on(model):
    assert STATE.receivers == ()
    assert not ACTIVE.on
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def assert_all_close(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def is_explicit(model):
    """Return whether the attention of ``model`` makes its matrices itself, by a softmax."""
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    bases = (vars(base).get("forward") for base in type(attention).__mro__)
    codes = (inspect.unwrap(forward).__code__ for forward in bases if inspect.isfunction(forward))
    return any("softmax" in code.co_names for code in codes)
