"""The kernel call of a module: every kind of code that computes softmax(q kᵀ · scale + bias) v."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, overrides
from torch.nn import functional as F

from dinov2_attn.errors import NotRecordedError, UnfaithfulError
from dinov2_attn.grafting.channel import graft_captured
from dinov2_attn.grafting.collector import weights_at_kernel
from dinov2_attn.kernels.call import ExplicitCall, FusedCall, fused_call, some_rows
from dinov2_attn.kernels.capture import Capture, check_calls, heads_of
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

B, HEADS, N, D = 2, 4, 6, 3
MASK = torch.ones(N, N, dtype=torch.bool).tril()


def scores(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(D)


def gated(q, k, v):
    return scores(q, k).softmax(-1) * 0.5 @ v


def masked_after(q, k, v):
    return scores(q, k).softmax(-1).masked_fill(~MASK, 0) @ v


def in_buffer(q, k, v):
    out = scores(q, k)
    return torch.softmax(out, -1, out=out) @ v


def baddbmm(q, k, v):
    start = torch.zeros(1, dtype=q.dtype)
    added = torch.baddbmm(start, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=1 / math.sqrt(D))
    return torch.bmm(added.softmax(-1), v.flatten(0, 1)).reshape(B, HEADS, N, D)


def baddbmm_in_keywords(q, k, v):
    start = torch.zeros(1, dtype=q.dtype)
    weights = scores(q, k).softmax(-1).flatten(0, 1)
    return torch.baddbmm(start, batch1=weights, batch2=v.flatten(0, 1)).reshape(B, HEADS, N, D)


def value_first(q, k, v):
    return (v.mT @ scores(q, k).softmax(-1).mT).mT


def einsum_letters_apart(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bqkh", q, k).div(math.sqrt(D)).softmax(2)
    return torch.einsum("bqkh,bhkd->bhqd", weights, v)


def einsum(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(math.sqrt(D)).softmax(-1)
    return torch.einsum("b h q k, b h k d -> b h q d", weights, v)


def einsum_of_any_dimensions(q, k, v):
    weights = torch.einsum("...qd,...kd->...qk", q, k).div(math.sqrt(D)).softmax(-1)
    return torch.einsum("b...qk,b...kd->b...qd", weights, v)


def einsum_of_a_list(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", [q, k]).div(math.sqrt(D)).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", [weights, v])


def einsum_of_values_first(q, k, v):
    weights = torch.einsum("...qd,...kd->...qk", q, k).div(math.sqrt(D)).softmax(-1)
    return torch.einsum("b...kd,b...qk->b...qd", v, weights)


def product_between(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ torch.matmul(v, other=torch.eye(D, dtype=v.dtype))


def einsum_without_heads(q, k, v):
    weights = (q[0, 0] @ k[0, 0].mT).softmax(-1)
    return torch.einsum("ij,jk", weights, v[0, 0])


def attribute(q, k, v):
    return KEPT(q, k, v)


KEPT = F.scaled_dot_product_attention


# What each kind computes, and the weights it is made of, as a factor on softmax(q kᵀ / √d).
KINDS = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "sdpa kept by another name": attribute,
    "sdpa with a scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "sdpa causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "sdpa boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK),
    "sdpa bias": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.arange(N * N).reshape(N, N).to(q.dtype) / 9
    ),
    "sdpa heads in the batch": lambda q, k, v: F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    ).reshape(B, HEADS, N, D),
    "sdpa windows": lambda q, k, v: F.scaled_dot_product_attention(
        q[:, None], k[:, None], v[:, None]
    )[:, 0],
    "softmax @": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "torch.softmax": lambda q, k, v: torch.matmul(torch.softmax(scores(q, k), dim=-1), v),
    "nn.functional": lambda q, k, v: F.softmax(scores(q, k), dim=3).matmul(v),
    "dropout that is off": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.5, False) @ v,
    "reshaped": lambda q, k, v: torch.bmm(
        scores(q, k).softmax(-1).reshape(-1, N, N), v.flatten(0, 1)
    ).reshape(B, HEADS, N, D),
    "gated": gated,
    "masked after": masked_after,
    "in a buffer": in_buffer,
    "baddbmm": baddbmm,
    "einsum": einsum,
    "einsum of any dimensions": einsum_of_any_dimensions,
    "einsum of a list": einsum_of_a_list,
    "einsum of values first": einsum_of_values_first,
    "value first": value_first,
    "another product between": product_between,
    "factors in keywords": lambda q, k, v: torch.matmul(
        input=torch.matmul(input=q, other=k.mT).div(math.sqrt(D)).softmax(-1), other=v
    ),
    "bmm in keywords": lambda q, k, v: torch.bmm(
        input=scores(q, k).softmax(-1).flatten(0, 1), mat2=v.flatten(0, 1)
    ).reshape(B, HEADS, N, D),
    "baddbmm in keywords": baddbmm_in_keywords,
    "softmax in keywords": lambda q, k, v: torch.softmax(input=scores(q, k), dim=-1) @ v,
    "softmax of distances": lambda q, k, v: torch.cdist(q, k).neg().softmax(-1) * 1 @ v,
    "sdpa in keywords": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    "torch.special": lambda q, k, v: torch.special.softmax(scores(q, k), -1) @ v,
}


class Attention(nn.Module):
    """Attention whose kernel is a function of queries, keys and values."""

    def __init__(self, kernel, dtype=torch.float64):
        super().__init__()
        self.qkv = nn.Linear(HEADS * D, 3 * HEADS * D, dtype=dtype)
        self.num_heads, self.kernel = HEADS, kernel
        with torch.no_grad():
            self.qkv.weight.copy_(noise(*self.qkv.weight.shape, seed=1))

    def forward(self, x):
        split = self.qkv(x).reshape(B, N, 3, HEADS, D).permute(2, 0, 3, 1, 4)
        return self.kernel(*split.unbind(0)).transpose(1, 2).reshape(B, N, HEADS * D)


X = noise(B, N, HEADS * D, seed=0, dtype=torch.float64)


def captured(kernel, x=X, **options):
    module, calls = Attention(kernel), []
    plain = module(x)
    with Capture(module, calls.append, **options) as capture:
        output = module(x)
    assert_same_bits(output, plain)
    return plain, calls, capture.calls


# No product of two tensors makes these scores, or its letters are not known.
UNKNOWN_SCORES = ("softmax of distances", "einsum of any dimensions", "einsum of values first")

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 1):
    del KINDS["sdpa with a scale"]  # the argument came in with torch 2.1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_are_what_the_kernel_returned(kind):
    output, (call,), count = captured(KINDS[kind])
    assert count == 1
    weights = call.weights()
    assert weights.shape == (B, HEADS, N, N)
    assert_close((weights @ call.value).transpose(1, 2).reshape(output.shape), output)
    call.check("a module")
    call.check("a module", one_head=True)
    if kind not in ("gated", "masked after"):
        assert_close(weights.sum(-1), torch.ones(B, HEADS, N))
        if kind in UNKNOWN_SCORES:
            assert (call.query, call.key) == (None, None)
        elif isinstance(call, ExplicitCall):
            assert_close((call.query @ call.key.mT / math.sqrt(D)).softmax(-1), weights)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_rows_and_the_mean_are_those_of_the_matrix(kind, data):
    _, (call,), _ = captured(KINDS[kind])
    rows = data.draw(st.lists(st.integers(-N, N - 1), max_size=4))
    whole = call.weights()
    assert_close(call.weights(rows), whole[:, :, rows])
    assert_close(call.weights(rows, "mean"), whole[:, :, rows].mean(1))
    assert call.rows == N


def test_fewer_heads_of_keys_serve_several_of_the_query():
    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)

    try:
        output, (call,), _ = captured(grouped)
    except TypeError:
        pytest.skip("this torch has no enable_gqa; the other kinds run")
    whole = torch.einsum("bhqd,bhkd->bhqk", call.query, call.key.repeat_interleave(2, 1))
    assert_close(call.weights(), (whole / math.sqrt(D)).softmax(-1))
    mixed = call.weights() @ call.value.repeat_interleave(2, 1)
    assert_close(mixed.transpose(1, 2).reshape(output.shape), output)
    call.check("a module")
    for _ in range(9):
        call.check("a module", one_head=True)


def test_dropout_is_left_out_of_the_weights_and_drawn_as_before():
    def dropped(q, k, v):
        return F.dropout(scores(q, k).softmax(-1), 0.5, True) @ v

    module, calls = Attention(dropped), []
    torch.manual_seed(0)
    plain = module(X)
    torch.manual_seed(0)
    with Capture(module, calls.append):
        assert_same_bits(module(X), plain)
    assert_close(calls[0].weights().sum(-1), torch.ones(B, HEADS, N))
    assert float((calls[0].weights() == 0).sum()) == 0


def own_dropout(weights):
    """Somebody's own function that lets torch override it."""
    if overrides.has_torch_function((weights,)):
        return overrides.handle_torch_function(own_dropout, (weights,), weights)
    return F.dropout(weights, 0.5)


# Dropout as code writes it: whether it drops, and with which probability.
DROPOUTS = {
    "F": (lambda w: F.dropout(w, 0.4, True), 0.4),
    "F by its own probability": (F.dropout, 0.5),
    "F in keywords": (lambda w: F.dropout(w, p=0.3, training=True), 0.3),
    "F in place": (lambda w: F.dropout(w, 0.3, True, True), 0.3),
    "F in place, in keywords": (lambda w: F.dropout(w, p=0.3, inplace=True), 0.3),
    "torch": (lambda w: torch.dropout(w, 0.3, True), 0.3),
    "torch in keywords": (lambda w: torch.dropout(w, p=0.3, train=True), 0.3),
    "torch in place": (lambda w: torch.dropout_(w, 0.3, True), 0.3),
    "torch, all in keywords": (lambda w: torch.dropout(input=w, p=0.3, train=True), 0.3),
    "of its own": (own_dropout, 0.5),
    "module": (nn.Dropout(0.3), 0.3),
    "module in place": (nn.Dropout(0.3, inplace=True), 0.3),
    "F off": (lambda w: F.dropout(w, 0.4, False), 0.0),
    "F off in keywords": (lambda w: F.dropout(w, p=0.4, training=False), 0.0),
    "torch off": (lambda w: torch.dropout(w, 0.4, False), 0.0),
    "torch off in keywords": (lambda w: torch.dropout(w, 0.4, train=False), 0.0),
    "nothing to drop": (lambda w: F.dropout(w, 0.0, True), 0.0),
    "module off": (nn.Dropout(0.3).eval(), 0.0),
}


@torch.no_grad()
def drawn_twice(module):
    """Run with the same draws, captured the second time; return queries, keys and the call."""
    calls = []
    q, k, _ = module.qkv(X).reshape(B, N, 3, HEADS, D).permute(2, 0, 3, 1, 4)
    torch.manual_seed(0)
    plain = module(X)
    torch.manual_seed(0)
    with Capture(module, calls.append):
        assert_same_bits(module(X), plain)
    (call,) = calls
    return q, k, call


@pytest.mark.parametrize("kind", DROPOUTS)
def test_weights_are_those_before_dropout_however_it_is_written(kind):
    drop, probability = DROPOUTS[kind]
    module = Attention(lambda q, k, v: drop(scores(q, k).softmax(-1)) @ v)
    q, k, call = drawn_twice(module)
    assert_close(call.weights(), scores(q, k).softmax(-1))
    assert call.dropout == probability


# What code may do between dropout and the product.
BEHIND_DROPOUT = {
    "in place": lambda w: w.mul_(0.5),
    "a mask in place": lambda w: w.masked_fill_(~MASK, 0),
    "a gate in keywords": lambda w: torch.mul(input=w, other=0.5),
    "a gate before": lambda w: torch.mul(torch.full((N, N), 0.5, dtype=w.dtype), w),
    "a sum with two more": lambda w: torch.addcmul(torch.zeros_like(w), torch.ones_like(w), w),
    "a cast in keywords": lambda w: w.to(dtype=torch.float32).to(dtype=torch.float64),
    "a copy": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "a view that is not used": lambda w: (w.mT, w)[1],
    "a copy by columns": lambda w: w.mT.contiguous().mT * 0.5,
    "dropout that is off": lambda w: F.dropout(w, 0.3, False),
    "dropout that is off, in keywords": lambda w: torch.dropout(input=w, p=0.3, train=False),
}


@pytest.mark.parametrize("kind", BEHIND_DROPOUT)
@pytest.mark.parametrize("drops", [False, True])
def test_what_comes_after_dropout_is_part_of_the_weights(kind, drops):
    after = BEHIND_DROPOUT[kind]
    module = Attention(lambda q, k, v: after(F.dropout(weights_of(q, k), 0.4, drops)) @ v)
    q, k, call = drawn_twice(module)
    assert_close(call.weights(), after(weights_of(q, k)))
    assert call.dropout == (0.4 if drops else 0)
    assert_close((call.query @ call.key.mT / math.sqrt(D)).softmax(-1), weights_of(q, k))


def test_weights_before_dropout_are_not_written_into():
    def kernel(q, k, v):
        weights = weights_of(q, k)
        out = F.dropout(weights, 0.4, True).mul_(0.5) @ v
        return out + weights.sum(-1, keepdim=True)

    module = Attention(kernel)
    with torch.no_grad():
        torch.manual_seed(0)
        plain = module(X)
        torch.manual_seed(0)
        with Capture(module, lambda call: None):
            assert_same_bits(module(X), plain)


def test_rows_of_what_comes_after_dropout_are_of_the_same_weights():
    module, calls = Attention(lambda q, k, v: torch.cat([rows(q, k) @ v] * 2, 2)), []

    def rows(q, k):
        return (F.dropout(weights_of(q, k), 0.4, True) * 0.5)[:, :, ::2]

    with torch.no_grad(), Capture(module, calls.append):
        q, k, _ = module.qkv(X).reshape(B, N, 3, HEADS, D).permute(2, 0, 3, 1, 4)
        module(X)
    (call,) = calls
    assert_close(call.weights(), weights_of(q, k) * 0.5)


@pytest.mark.parametrize("kind", DROPOUTS)
def test_the_gradient_is_that_by_the_weights_before_dropout(kind):
    drop, _ = DROPOUTS[kind]
    (q, k, v), calls, seen = noise(3, B, HEADS, N, D, seed=0, dtype=torch.float64), [], []
    weights = weights_of(q, k).requires_grad_()
    with Capture(nn.Identity(), calls.append):
        softmax = (weights.log() * 1).softmax(-1)  # the weights again, as a softmax gives them
        softmax.retain_grad()
        out = drop(softmax * 1) @ v
    calls[0].place.watch(seen.append)
    (out * noise(*out.shape, seed=3)).sum().backward()
    assert_close(seen[0], softmax.grad)


def weights_of(q, k):
    return scores(q, k).softmax(-1)


def test_a_cast_between_gives_the_tensor_that_is_multiplied():
    def cast(q, k, v):
        return (scores(q, k).softmax(-1).float() @ v.float()).double()

    _, (call,), _ = captured(cast)
    assert call.weights().dtype == torch.float32


def test_a_buffer_that_the_next_layer_writes_into_keeps_the_weights():
    buffer = torch.empty(B, HEADS, N, N, dtype=torch.float64)

    def buffered(q, k, v):
        return torch.softmax(scores(q, k), -1, out=buffer) @ v

    with torch.no_grad():
        _, (call,), _ = captured(buffered)
        before = call.weights().clone()
        buffer.zero_()
    assert_same_bits(call.weights(), before)


@pytest.mark.parametrize(
    "kernel",
    [
        einsum_without_heads,
        lambda q, k, v: torch.mm((q[0, 0] @ k[0, 0].mT).softmax(-1), v[0, 0]),
        lambda q, k, v: (q[0, 0] @ k[0, 0].mT).softmax(-1).mm(v[0, 0]),
    ],
)
def test_two_matrices_without_batch_and_heads_are_one_head(kernel):
    (q, k, v), calls = noise(3, 1, 1, N, D, seed=0, dtype=torch.float64), []
    with Capture(nn.Identity(), calls.append):
        kernel(q, k, v)
    (call,) = calls
    assert_close(call.weights(), (q @ k.mT).softmax(-1))


CROSS = {
    "@": lambda w, v: w @ v,
    "values first": lambda w, v: (v.mT @ w.mT).mT,
    "einsum": lambda w, v: torch.einsum("bhqk,bhkd->bhqd", w, v),
    "einsum of values first": lambda w, v: torch.einsum("bhkd,bhqk->bqhd", v, w),
    "einsum of a transposed matrix": lambda w, v: torch.einsum("bhkq,bhkd->bhqd", w.mT, v),
    "einsum of any dimensions between": lambda w, v: torch.einsum("b...qk,b...kd->b...qd", w, v),
    "einsum of all dimensions": lambda w, v: torch.einsum("...qk,...kd->...qd", w, v),
    "einsum that names no result": lambda w, v: torch.einsum("...qk,...kd", w, v),
    "einsum of numbers for letters": lambda w, v: torch.einsum(
        w, [0, 1, 2, 3], v, [0, 1, 3, 4], [0, 1, 2, 4]
    ),
    "einsum of any dimensions behind": lambda w, v: torch.einsum(
        "k...q,k...d->...qd", w.permute(3, 0, 1, 2), v.permute(2, 0, 1, 3)
    ),
    "einsum of a permuted matrix": lambda w, v: torch.einsum(
        "kbhq,kbhd->bhqd", w.permute(3, 0, 1, 2), v.permute(2, 0, 1, 3)
    ),
    "a view of a view": lambda w, v: w.mT.mT @ v,
}


@pytest.mark.parametrize("kind", CROSS)
def test_queries_and_keys_of_two_sequences(kind):
    query, calls = noise(B, HEADS, 5, D, seed=0), []
    key, value = noise(B, HEADS, 7, D, seed=1), noise(B, HEADS, 7, 8, seed=2)
    with Capture(nn.Identity(), calls.append):
        CROSS[kind](weights_of(query, key), value)
    (call,) = calls
    assert_close(call.weights(), weights_of(query, key))
    assert_same_bits(call.value, value)


NO_ROWS = {
    "the matrix transposed": lambda w, v: w.mT @ torch.ones(B, HEADS, 5, 8),
    "einsum of the matrix transposed": lambda w, v: torch.einsum("bhqk,bhqd->bhkd", w, v[:, :, :5]),
    "a part of the keys": lambda w, v: w[..., 2:] @ v[:, :, 2:],
    "every second key": lambda w, v: w[..., ::2] @ v[:, :, ::2],
    "a vector": lambda w, v: w @ v[0, 0, :, 0],
    "a row alone": lambda w, v: torch.einsum("k,kd->d", w[0, 0, 0], v[0, 0]),
    "einsum of one": lambda w, v: torch.einsum("bhqk->bhq", w),
    "einsum of three": lambda w, v: torch.einsum("bhqk,bhkd,d->bhqd", w, v, v[0, 0, 0]),
    "einsum of an outer product": lambda w, v: torch.einsum("bhqk,bhkd->bhqkd", w, v),
    "einsum over two": lambda w, v: torch.einsum("bhqk,bhkd->bqd", w, v),
}


@pytest.mark.parametrize("kind", NO_ROWS)
def test_products_that_do_not_sum_over_the_keys_are_not_taken(kind):
    query, calls = noise(B, HEADS, 5, D, seed=0), []
    key, value = noise(B, HEADS, 7, D, seed=1), noise(B, HEADS, 7, 8, seed=2)
    with Capture(nn.Identity(), calls.append) as capture:
        NO_ROWS[kind](weights_of(query, key), value)
    assert (calls, capture.calls) == ([], 0)


UNSEEN = {
    "exp and sum by hand": lambda q, k, v: (
        scores(q, k).exp() / scores(q, k).exp().sum(-1, keepdim=True) @ v
    ),
    "softmax over the queries": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "a transposed matrix": lambda q, k, v: scores(q, k).softmax(-1).mT @ v,
    "a softmax that weighs nothing": lambda q, k, v: scores(q, k).softmax(-1)[..., :1] * v,
    "einsum over the rows": lambda q, k, v: torch.einsum(
        "bhqk,bhqd->bhkd", scores(q, k).softmax(-1), v
    ),
    "letters apart": einsum_letters_apart,
    "a diagonal": lambda q, k, v: torch.einsum("bhkk,bhkd->bhd", scores(q, k).softmax(-1), v)[
        :, :, None
    ].expand_as(v),
    "the mean of heads": lambda q, k, v: (
        scores(q, k).softmax(-1).mean(1, keepdim=True) @ v[:, :1]
    ).expand_as(v),
    "a softmax of a vector": lambda q, k, v: (v[0, 0, :, 0].softmax(0)[None] @ v[0, 0]).expand_as(
        v
    ),
    "a tensor like a softmax": lambda q, k, v: torch.ones_like(scores(q, k).softmax(-1)) @ v,
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_is_no_row_of_weights_times_values_is_not_taken(kind):
    _, calls, count = captured(UNSEEN[kind])
    assert (calls, count) == ([], 0)


@pytest.mark.parametrize(("kind", "words"), [("none", "none that can be seen"), ("two", "2 calls")])
def test_no_call_and_two_calls_are_errors_that_name_the_module(kind, words, monkeypatch):
    sdpa = F.scaled_dot_product_attention
    kernel = UNSEEN["exp and sum by hand"] if kind == "none" else lambda *a: sdpa(*a) + sdpa(*a)
    module = Attention(kernel)
    monkeypatch.setattr(Attention, "forward", graft_captured(Attention.forward))
    with pytest.raises(NotRecordedError, match=rf"(?s)Attention to call.*{words}"):
        weights_at_kernel(lambda: module(X), module, [module])


def test_a_pass_that_stops_runs_no_kernel():
    ran, calls = [], []

    def kernel(q, k, v):
        ran.append("before")
        out = F.scaled_dot_product_attention(q, k, v)
        ran.append("after")
        return out

    with (
        pytest.raises(BaseException, match="^$"),
        Capture(Attention(kernel), calls.append, stops=True) as capture,
    ):
        capture._module(X)
    assert ran == ["before"]
    assert calls[0].output is None


def test_a_kernel_that_is_something_else_is_unfaithful():
    _, (call,), _ = captured(KINDS["sdpa"])
    wrong = FusedCall(
        call.kernel, call.query, call.key, call.value, 2 * call.scale, output=call.output
    )
    with pytest.raises(UnfaithfulError, match=r"in layer 3\b"):
        wrong.check("layer 3")


def test_checks_of_one_head_come_to_every_head():
    """One head of one sample is wrong. A check of all finds it, and so do several of one head."""
    bias = noise(B, HEADS, N, N, seed=4)
    _, (call,), _ = captured(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias))
    wrong = bias.clone()
    wrong[1, 2] += noise(N, N, seed=5)
    other = replace(call, bias=wrong)
    with pytest.raises(UnfaithfulError):
        other.check("a layer")
    found = 0
    for _ in range(400):
        call.check("a layer", one_head=True)
        try:
            other.check("a layer", one_head=True)
        except UnfaithfulError:
            found += 1
    assert 0 < found < 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 99), size=st.sampled_from([1, 30]))
def test_the_kernels_own_rounding_is_no_error(dtype, seed, size):
    q, k, v = (noise(1, 2, 50, 16, seed=seed + i).to(dtype) * size for i in range(3))
    call = fused_call(q, k, v)
    try:
        q @ k.mT
    except RuntimeError:
        pytest.skip("this torch multiplies no half precision on a CPU; bfloat16 runs")
    output = F.scaled_dot_product_attention(q, k, v)
    call = replace(call, output=output)
    call.check("a layer")
    call.check("a layer", one_head=True)


def test_the_rows_of_a_proof_draw_nothing_from_torch():
    state = torch.get_rng_state()
    rows = {some_rows(40).start for _ in range(20)}
    assert len(rows) > 1
    assert_same_bits(torch.get_rng_state(), state)


def test_autocast_gives_the_weights_of_the_dtype_in_which_the_kernel_ran():
    module, calls = Attention(KINDS["sdpa"], torch.float32), []
    # A norm in float32 before the kernel, as of queries and keys.
    module.kernel = lambda q, k, v: F.scaled_dot_product_attention(q.float(), k.float(), v)
    with torch.autocast("cpu", torch.bfloat16), Capture(module, calls.append):
        try:
            output = module(X.float())
        except RuntimeError:
            pytest.skip("this torch's autocast does not cast for its kernel; the other dtypes run")
    assert calls[0].weights().dtype == output.dtype


def test_an_interruption_in_pytorchs_own_code_may_lose_the_mode():
    """PyTorch takes a mode away while it runs. The modes of others stay, and so does the error."""

    class Interrupted(nn.Linear):
        def forward(self, x):
            overrides._pop_mode()
            raise KeyboardInterrupt

    class Outer(overrides.BaseTorchFunctionMode):
        pass

    with Outer() as outer:
        with pytest.raises(KeyboardInterrupt), Capture(nn.Linear(2, 2), lambda call: None):
            Interrupted(2, 2)(torch.ones(1, 2))
        assert overrides._get_current_function_mode_stack() == [outer]
    assert overrides._get_current_function_mode_stack() == []


class Nested(nn.Module):
    """A module that runs another attention module, and then a kernel of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.num_heads, self.calls = Attention(KINDS["sdpa"]), HEADS, []

    def forward(self, x):
        with Capture(self.inner, self.calls.append) as inner:
            x = self.inner(x)
        inner.leave()  # once more: it changes nothing
        return Attention(KINDS["softmax @"])(x)


def test_a_module_inside_gives_back_what_it_took():
    module, calls = Nested(), []
    with Capture(module, calls.append):
        module(X)
    assert [call.kernel for call in module.calls] == ["scaled_dot_product_attention"]
    assert [call.kernel for call in calls] == ["softmax"]


def test_an_interrupted_exit_gives_back_what_it_took_at_the_next_chance():
    module, calls, lost = Attention(KINDS["sdpa"]), [], []
    with Capture(module, calls.append):
        inner = Capture(module, lost.append)
        inner.__enter__()
        inner.leave()
        module(X)
    assert len(calls) == 1
    assert not lost
    assert overrides._get_current_function_mode_stack() == []


def test_what_takes_a_call_runs_unseen_and_may_change_the_output():
    module, found = Attention(KINDS["softmax @"]), []
    plain = module(X)

    def take(call):
        found.append(torch.softmax(input=call.matrix, dim=-1) @ call.value)
        return lambda out: out * 2

    with Capture(module, take) as capture:
        assert_same_bits(module(X), plain * 2)
    assert len(found) == capture.calls == 1


def test_a_function_of_torch_without_a_name_runs():
    class Nameless:
        def __call__(self, x):
            if overrides.has_torch_function((x,)):
                return overrides.handle_torch_function(self, (x,), x)
            return x + 1

    with Capture(nn.Identity(), lambda call: None):
        assert_same_bits(Nameless()(X), X + 1)


NAMES_OF_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "nheads", "n_head")


@pytest.mark.parametrize("name", NAMES_OF_HEADS)
def test_the_number_of_heads_has_many_names(name):
    module = nn.Identity()
    assert heads_of(module) is None
    setattr(module, name, 3)
    assert heads_of(module) == 3


def test_a_name_of_heads_that_is_no_number_is_not_theirs():
    module = nn.Identity()
    module.num_heads, module.n_head = "many", 5
    assert heads_of(module) == 5


def test_as_many_calls_as_tensors_are_expected():
    check_calls(1, "a module")
    check_calls(2, "a module", 2)
    for calls, expected, words in (
        (2, 1, "kernel once in a pass: .*2 calls"),
        (0, 1, "kernel once in a pass: .*none that can be seen"),
        (1, 2, "kernel 2 times for 2 tensors: .*1 calls"),
    ):
        with pytest.raises(NotRecordedError, match=f"(?s){words}"):
            check_calls(calls, "a module", expected)
