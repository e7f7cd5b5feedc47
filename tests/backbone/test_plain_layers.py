"""When a block is known to draw no random number before its kernel: nothing but plain layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dinov2_attn
from dinov2_attn.backbone import projection
from dinov2_attn.backbone.projection import draws_nothing
from tests.support import reference, upstreams
from tests.support.strategies import noise
from tests.support.tolerances import assert_close


class Norm(nn.LayerNorm):
    pass


class Linear(nn.Linear):
    pass


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def of_another_class(block):
    block.norm1 = Norm(12)


def projected_by_another_class(block):
    block.attn.qkv = Linear(12, 36)


def with_own_forward(block):
    block.attn.qkv.forward = torch.relu


def without_projection(block):
    block.attn = nn.Identity()


OTHERS = {
    "another norm": of_another_class,
    "no norm": lambda block: delattr(block, "norm1"),
    "another projection": projected_by_another_class,
    "a forward of its own": with_own_forward,
    "no projection": without_projection,
    "a hook on the norm": lambda block: block.norm1.register_forward_hook(lambda *_: None),
    "a hook on the attention": lambda block: block.attn.register_forward_pre_hook(lambda *_: None),
    "a hook on the projection": lambda block: block.attn.qkv.register_forward_hook(lambda *_: None),
    "a parametrisation": lambda block: parametrize.register_parametrization(
        block.attn.qkv, "weight", Halved()
    ),
}


def test_blocks_of_upstream_draw_nothing():
    for upstream in upstreams.WITH_MODELS:
        assert draws_nothing(upstream.cls("Block")(12, num_heads=2))
    assert draws_nothing(upstreams.ANOMALIB.cls("CausalAttentionBlock")(12, num_heads=2))


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_block_with_anything_else_may(change):
    block = upstreams.FIRST.cls("Block")(12, num_heads=2)
    change(block)
    assert not draws_nothing(block)


def test_global_hooks_may():
    block = upstreams.FIRST.cls("Block")(12, num_heads=2)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert not draws_nothing(block)
        finally:
            handle.remove()
    assert draws_nothing(block)


@torch.no_grad()
@pytest.mark.parametrize("few", [True, False])
def test_a_plain_projection_is_not_called_and_any_other_is_called_once(layers, few):
    """Without autograd only those queries are made that are asked for, and no values."""
    module, calls = layers.attentions[0](24, num_heads=2), []
    tokens = noise(2, 9, 24, seed=0)
    expected = module(tokens, return_attn=True)
    forward = type(module.qkv).forward

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(x.shape)
            return forward(self, x)

    module.qkv.__class__ = Counted
    rows = [0] if few else None
    found = module(tokens, return_attn=True, queries=rows)
    assert_close(found, expected[:, :, rows] if few else expected)
    assert calls == [tokens.shape]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 2, 5, 5), (1, 2, 5, 5), (3, 1, 5, 5), (5, 5)])
def test_samples_that_come_one_by_one_have_their_own_bias(monkeypatch, shape):
    monkeypatch.setattr(projection, "TILE_BYTES", 1)
    module, tokens = upstreams.MOGE.cls("Attention")(12, num_heads=2), noise(3, 5, 12, seed=0)
    bias = noise(*shape, seed=1)
    with dinov2_attn.install(module):
        weights = module(tokens, bias, return_attn=True)
        rows = module(tokens, bias, return_attn=True, queries=[1, 3])
    expected = reference.weights(module, tokens, bias=bias.expand(3, 2, 5, 5))
    assert_close(weights, expected)
    assert_close(rows, expected[:, :, [1, 3]])
