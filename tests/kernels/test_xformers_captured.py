"""What xFormers' kernel is given in each of its layouts, seen and edited by the capture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dinov2_attn.kernels.capture import Capture
from dinov2_attn.kernels.xformers import graft_captured_kernel, graft_kernel
from tests.kernels.test_xformers_fallback import no_operator
from tests.math.test_bias import OwnBlocks
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet

B, G, H, Q, N, D, V = 2, 2, 3, 5, 7, 6, 8

# What stands between the tokens and the channels: nothing, heads, or groups and heads.
LAYOUTS = {"(B, N, d)": (), "(B, N, heads, d)": (H,), "(B, N, groups, heads, d)": (G, H)}


def by_heads(tensor):
    """Return ``tensor`` with what stands between tokens and channels as its heads."""
    return tensor.reshape(*tensor.shape[:2], -1, tensor.shape[-1]).transpose(1, 2)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    """Compute what xFormers documents."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = by_heads(query) @ by_heads(key).mT * scale
    scores = scores if attn_bias is None else scores + attn_bias
    weights = nn.functional.dropout(scores.softmax(-1), p)
    out = weights @ by_heads(value)
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


def given(between):
    return [
        noise(B, length, *between, size, seed=i, dtype=torch.float64)
        for i, (length, size) in enumerate(((Q, D), (N, D), (N, V)))
    ]


@pytest.mark.parametrize(("scale", "factor"), [(None, 1 / math.sqrt(D)), (0.3, 0.3)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_call_is_seen_in_each_layout(layout, with_bias, scale, factor):
    query, key, value = given(LAYOUTS[layout])
    heads = math.prod(LAYOUTS[layout])
    bias = noise(B, heads, Q, N, seed=5, dtype=torch.float64) if with_bias else None
    kernel, calls = graft_captured_kernel(memory_efficient_attention), []
    plain = kernel(query, key, value, bias, scale=scale)
    with Capture(nn.Identity(), calls.append):
        output = kernel(query, key, value=value, attn_bias=bias, scale=scale)
    assert_same_bits(output, plain)
    (call,) = calls
    scores = by_heads(query) @ by_heads(key).mT * factor
    expected = (scores if bias is None else scores + bias).softmax(-1)
    assert call.kernel == "memory_efficient_attention"
    assert_close(call.weights(), expected)
    assert_same_bits(call.output, by_heads(output))
    call.check("a module")
    with Capture(nn.Identity(), calls.append, edit=lambda pattern, _: pattern.zero([0])):
        output = kernel(query=query, key=key, value=value, attn_bias=bias, scale=scale)
    expected[:, 0] = 0
    assert output.shape == plain.shape
    assert_close(by_heads(output), expected @ by_heads(value))


def test_it_may_drop_weights():
    query, key, value = given((H,))
    kernel, calls = graft_captured_kernel(memory_efficient_attention), []
    with Capture(nn.Identity(), calls.append):
        kernel(query, key, value, None, 0.5)
        kernel(query, key, value, p=0.25, op="an operator")
        kernel(query, key, value)
    assert [call.dropout for call in calls] == [0.5, 0.25, 0.0]
    for call in calls:
        assert_close(call.weights().sum(-1), torch.ones(B, H, Q))


@quiet
@pytest.mark.parametrize("scale", [None, 0.3])
def test_where_it_has_no_operator_pytorchs_kernel_is_seen_as_its_own(scale):
    lengths = [2, 3]
    query, key, value = (
        noise(1, 5, H, size, seed=i, dtype=torch.float64) for i, size in enumerate((D, D, V))
    )
    kernel, calls = graft_kernel(no_operator), []
    with Capture(nn.Identity(), calls.append):
        output = kernel(query, key, value, OwnBlocks(lengths), scale=scale)
    (call,) = calls
    call.check("a module")
    alone = [t.split(lengths, 1) for t in (query, key, value)]
    for i, weights in enumerate(call.weights()):
        part = kernel(*(tensors[i] for tensors in alone), scale=scale)
        assert_close(weights @ by_heads(alone[2][i]), by_heads(part))
        assert_close(output.split(lengths, 1)[i], part)


@quiet
def test_the_fallback_takes_values_of_another_size_and_fewer_keys():
    query, key, value = given((H,))
    found = graft_kernel(no_operator)(query, key, value)
    assert_close(found, memory_efficient_attention(query, key, value))
    bias = noise(Q, N, seed=5)  # float32, and one for all heads
    found = graft_kernel(no_operator)(query, key, value, bias)
    assert_close(found, memory_efficient_attention(query, key, value, bias.double()))
