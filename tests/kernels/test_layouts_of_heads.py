"""Where heads stand in what a kernel is given: before windows, behind them, in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dinov2_attn
from dinov2_attn.errors import NotEditedError, NotRecordedError
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, same_bits

B, H, W, N, D = 2, 3, 4, 5, 6


class Windows(nn.Module):
    """Attention in windows, with the heads before or behind them."""

    num_heads = H

    def __init__(self, order, kernel):
        super().__init__()
        self.qkv, self.proj = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)
        self.order, self.kernel, self.seen = order, kernel, {}

    def forward(self, x):
        parts = self.qkv(x).unflatten(-1, (3, H, D)).movedim(-3, 0)  # (3, B, W, N, H, D)
        query, key, value = (part.transpose(2, 3) for part in parts)  # (B, W, H, N, D)
        scores = torch.einsum("bwhqd,bwhkd->bwhqk", query, key) / D**0.5
        self.seen = {"truth": scores.softmax(-1).detach().flatten(0, 1), "value": value}
        if self.order == "heads first":
            query, key, value = (t.transpose(1, 2).contiguous() for t in (query, key, value))
        out = self.kernel(query, key, value)
        if self.order == "heads first":
            out = out.transpose(1, 2)
        self.seen["out"] = out
        return self.proj(out.transpose(2, 3).flatten(-2))


def explicit(query, key, value):
    return (query @ key.mT / D**0.5).softmax(-1) @ value


@pytest.mark.parametrize("kernel", [F.scaled_dot_product_attention, explicit])
@pytest.mark.parametrize("order", ["heads first", "windows first"])
def test_heads_are_told_from_windows(order, kernel):
    model = nn.Sequential(Windows(order, kernel)).eval()
    x = noise(B, W, N, H * D, seed=0).float()
    with torch.no_grad():
        with dinov2_attn.record(model, check="every") as maps:
            model(x)
        assert_close(maps.weights[0], model[0].seen["truth"])
        with dinov2_attn.edit(model, heads=[1]):
            model(x)
        gone = model[0].seen["out"]
        assert gone[:, :, 1].abs().max() == 0
        assert gone[:, :, 0].abs().min() > 0
        with dinov2_attn.edit(model, weights=lambda layer, weights: weights.flip(-1)):
            model(x)
        flipped = model[0].seen["truth"].flip(-1).unflatten(0, (B, W))
        assert_close(model[0].seen["out"], flipped @ model[0].seen["value"])


class Explicit(nn.Module):
    """Explicit attention, with something between the softmax and the product."""

    num_heads = H

    def __init__(self, between):
        super().__init__()
        self.qkv, self.proj = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)
        self.mix = nn.Linear(H, H)
        self.between, self.truth = between, None

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / D**0.5).softmax(-1)
        out = self.between(self, weights, value)
        return self.proj(out.transpose(1, 2).flatten(2))


def talking(module, weights, value):
    mixed = module.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    module.truth = mixed.clone()
    return F.dropout(mixed, 0.3, training=False) @ value


def cast_after_dropout(module, weights, value):
    module.truth = weights.clone()
    return F.dropout(weights.double(), 0.5, training=True).to(value.dtype) @ value


def viewed_after_dropout(module, weights, value):
    module.truth = weights.clone()
    dropped = F.dropout(weights.transpose(1, 2), 0.5, training=True)
    return dropped.transpose(1, 2) @ value


def twice_dropped(module, weights, value):
    module.truth = weights.clone()
    return F.dropout(F.dropout(weights, 0.3, training=True), 0.3, training=True) @ value


def out_of_a_buffer(module, weights, value):
    module.truth = weights.clone()
    module.buffer = torch.empty_like(weights) if not hasattr(module, "buffer") else module.buffer
    module.buffer.copy_(weights)
    out = module.buffer @ value
    module.buffer.zero_()
    return out


def transposed_product(module, weights, value):
    module.truth = weights.clone()
    return (value.mT @ weights.mT).mT


KINDS = (
    talking,
    cast_after_dropout,
    viewed_after_dropout,
    twice_dropped,
    out_of_a_buffer,
    transposed_product,
)


@pytest.mark.parametrize("between", KINDS)
def test_what_is_multiplied_comes_back_before_dropout(between):
    model = nn.Sequential(Explicit(between))
    with torch.no_grad(), dinov2_attn.record(model) as maps:
        model(noise(B, N, H * D, seed=0).float())
    assert_close(maps.weights[0], model[0].truth)


def relative(module, weights, value):
    """Products with values and with embeddings of positions, as of Shaw et al."""
    return weights @ value + torch.einsum("bhij,ijd->bhid", weights, torch.ones(N, N, D))


def relative_in_a_list(module, weights, value):
    return weights @ value + torch.einsum("bhij,ijd->bhid", [weights, torch.ones(N, N, D)])


def relative_in_keywords(module, weights, value):
    return weights @ value + torch.matmul(input=weights, other=torch.ones(N, D))


def of_a_copy(module, weights, value):
    copy = weights * 1
    return weights @ value + copy @ torch.ones(N, D)


def of_a_later_copy(module, weights, value):
    out = weights @ value
    return out + weights.transpose(1, 2).contiguous().transpose(1, 2) @ torch.ones(N, D)


def before_and_after_dropout(module, weights, value):
    return F.dropout(weights, 0.5, training=True) @ value + weights @ torch.ones(N, D)


def of_a_mix_and_alone(module, weights, value):
    mixed = module.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    mixed = F.dropout(mixed, 0.3, training=False)
    return mixed @ value + weights @ torch.ones(N, D)


def in_chunks(module, weights, value):
    return torch.cat([weights[:, :, i : i + 2] @ value for i in range(0, N, 2)], 2)


PRODUCTS = (
    relative,
    relative_in_a_list,
    relative_in_keywords,
    of_a_copy,
    of_a_later_copy,
    before_and_after_dropout,
    of_a_mix_and_alone,
    in_chunks,
)


@pytest.mark.parametrize("between", PRODUCTS)
@pytest.mark.parametrize("change", [{"heads": [0]}, {"keys": [1]}], ids=str)
def test_an_edit_that_would_miss_a_product_is_refused(between, change):
    model, x = nn.Sequential(Explicit(between)).eval(), noise(B, N, H * D, seed=0).float()
    with torch.no_grad(), dinov2_attn.record(model) as maps:
        plain = model(x)
    assert maps.weights[0].shape == (B, H, N, N)
    with (
        pytest.raises(NotEditedError, match="one product of the whole softmax in Explicit"),
        torch.no_grad(),
        dinov2_attn.edit(model, **change),
    ):
        model(x)
    assert between is before_and_after_dropout or same_bits(model(x), plain)


def routed(module, weights, value):
    """A second softmax chooses among heads, as in a mixture of heads."""
    gate = (weights[:, :, 0, :H] * 9).softmax(-1)
    return torch.einsum("bhg,bgnd->bhnd", gate, weights @ value)


def test_a_softmax_that_weighs_heads_is_no_second_use():
    model, x = nn.Sequential(Explicit(routed)).eval(), noise(B, N, H * D, seed=0).float()
    with torch.no_grad(), dinov2_attn.record(model) as maps:
        plain = model(x)
    assert maps.weights[0].shape == (B, H, N, N)
    with torch.no_grad(), dinov2_attn.edit(model, heads=[0]):
        assert not same_bits(model(x), plain)


def wiped(module, weights, value):
    out = weights @ value
    weights.zero_()
    return out


def test_weights_that_are_written_into_later_are_refused():
    model, x = nn.Sequential(Explicit(wiped)).eval(), noise(B, N, H * D, seed=0).float()
    with (
        pytest.raises(NotRecordedError, match="Explicit leaves as they were multiplied"),
        torch.no_grad(),
        dinov2_attn.record(model),
    ):
        model(x)


class Given(nn.Module):
    """Hands PyTorch's kernel tensors of its own."""

    num_heads = H

    def __init__(self, *tensors, mask=None):
        super().__init__()
        self.qkv = self.proj = nn.Identity()
        self.tensors, self.mask = tensors, mask

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.tensors, self.mask)


def shaped(*leading, seed):
    return noise(*leading, N, D, seed=seed).float()


LAYOUTS = {
    "one query for all samples": ([(1, H), (B, H), (B, H)], None),
    "one query for all heads": ([(B, 1), (B, H), (B, H)], None),
    "one key for all heads": ([(B, H), (B, 1), (B, H)], None),
    "a mask for each head in the batch": ([(B * H,)] * 3, (B * H, N, N)),
    "a mask for all queries": ([(B * H,)] * 3, (B * H, 1, N)),
    "a mask for each window": ([(B, W, H)] * 3, (W, 1, N, N)),
}


@pytest.mark.parametrize(("leading", "mask"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_the_kernel_broadcasts_is_broadcast(leading, mask):
    query, key, value = (shaped(*shape, seed=i) for i, shape in enumerate(leading))
    bias = None if mask is None else noise(*mask, seed=9).float()
    scores = query @ key.mT / D**0.5 + (0 if bias is None else bias)
    expected = scores.softmax(-1)
    expected = expected.reshape(-1, H, N, N)
    model = nn.Sequential(Given(query, key, value, mask=bias)).eval()
    with torch.no_grad(), dinov2_attn.record(model, check="every") as maps:
        for _ in range(3):
            model(torch.ones(1))
    for one in maps:
        assert_close(one.weights[0], expected)
