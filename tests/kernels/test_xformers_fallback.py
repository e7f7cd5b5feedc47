"""Where xFormers has no kernel PyTorch's answers, with one warning, and goes with uninstall()."""

from __future__ import annotations

import inspect
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dinov2_attn
from dinov2_attn.errors import KernelFallbackWarning, PatchedOnTopError
from dinov2_attn.kernels.xformers import graft_kernel
from tests.support import reference, upstreams, xformers_visibility
from tests.support.strategies import noise, seeds
from tests.support.tolerances import are_close, assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet

NAME = "memory_efficient_attention"
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@pytest.fixture
def pristine():
    """Upstream's first commit, imported with real xFormers and not installed."""
    upstream = upstreams.FIRST
    with xformers_visibility.visible(), upstream.imported_anew():
        upstream.module(upstream.model)
        yield upstream
        dinov2_attn.uninstall()


@pytest.fixture(scope="module")
def fmha():
    with xformers_visibility.visible():
        from xformers.ops import fmha

        yield fmha


def definition(query, key, value, bias=None):
    """xFormers' documented formula on ``(B, N, heads, d)``, in NumPy, dense, row by row."""
    q, k, v = (t.double().numpy() for t in (query, key, value))
    out = np.zeros(q.shape)
    for b, n, h in np.ndindex(*q.shape[:3]):
        scores = k[b, :, h] @ q[b, n, h] / np.sqrt(q.shape[-1])
        if bias is not None:
            scores = (
                scores
                + np.broadcast_to(
                    bias.double().numpy(), (*q.shape[:1], q.shape[2], q.shape[1], k.shape[1])
                )[b, h, n]
            )
        powers = np.exp(scores - scores.max())
        out[b, n, h] = powers @ v[b, :, h] / powers.sum()
    return torch.from_numpy(out)


def inputs(length, seed, dtype=torch.float64, batch=1):
    return [noise(batch, length, 3, 4, seed=seed + i, dtype=dtype) for i in range(3)]


def masks(fmha, kind, lens, length, seed):
    if kind == "none":
        return None
    if kind == "dense":
        return noise(1, 3, length, length, seed=seed)  # float32, whatever the queries are
    if kind == "triangular":
        return fmha.attn_bias.LowerTriangularMask()
    cls = getattr(fmha.attn_bias, kind)
    return cls.from_seqlens(lens)


KINDS = ["none", "dense", "triangular", "BlockDiagonalMask", "BlockDiagonalCausalMask"]


def no_operator(*args, **kwargs):
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")


@quiet
@given(kind=st.sampled_from(KINDS), lens=lengths, dtype=dtypes, seed=seeds)
def test_the_fallback_is_xformers_documented_formula(fmha, kind, lens, dtype, seed):
    query, key, value = inputs(sum(lens), seed, dtype)
    bias = masks(fmha, kind, lens, sum(lens), seed)
    ours = graft_kernel(no_operator)(query, key, value, attn_bias=bias)
    if bias is not None and not isinstance(bias, torch.Tensor):
        bias = bias.materialize((sum(lens), sum(lens)), dtype=torch.float64)
    assert ours.dtype == dtype
    assert_close(ours, definition(query, key, value, bias))


@quiet
@given(lens=lengths, seed=seeds)
def test_segments_do_not_meet(fmha, lens, seed):
    """One NaN stays in its segment: a dense mask would spread it by 0 · NaN."""
    query, key, value = inputs(sum(lens), seed)
    value[0, 0] = key[0, 0] = float("nan")
    bias = fmha.BlockDiagonalMask.from_seqlens(lens)
    out = graft_kernel(no_operator)(query, key, value, attn_bias=bias)
    assert out[0, : lens[0]].isnan().all()
    assert not out[0, lens[0] :].isnan().any()


@quiet
def test_scale_and_dropout_mean_what_they_mean_to_xformers():
    query, key, value = inputs(5, 0)
    kernel = graft_kernel(no_operator)
    assert_close(kernel(query, key, value, scale=0.3), definition(query * 0.6, key, value))
    torch.manual_seed(0)
    dropped = kernel(query, key, torch.ones_like(value), p=0.5)
    assert not are_close(dropped, torch.ones_like(dropped))
    assert_same_bits(kernel(query, key, value, None, 0.0), kernel(query, key, value))


def test_gradients_are_those_of_the_formula():
    tensors = [t.requires_grad_() for t in inputs(4, 0)]
    with pytest.warns(KernelFallbackWarning):
        assert torch.autograd.gradcheck(graft_kernel(no_operator), tensors, fast_mode=True)


# Only where xFormers has none


def test_where_xformers_answers_its_very_result_is_returned():
    result = torch.ones(1)
    seen = []

    def kernel(*args, **kwargs):
        seen.append((args, kwargs))
        return result

    args, kwargs = inputs(3, 0), {"attn_bias": None, "op": "an operator"}
    assert graft_kernel(kernel)(*args, **kwargs) is result
    assert seen == [(tuple(args), kwargs)]


def test_a_real_kernel_is_used_where_there_is_one(pristine):
    """Old xFormers computes small heads on a CPU; on a GPU any does."""
    kernel = vars(pristine.module(pristine.attention))[NAME]
    query = noise(2, 5, 3, 8, seed=0).to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        expected = kernel(query, query, query)
    except NotImplementedError:
        pytest.skip("this xFormers has no kernel here: a kernel that answers is tested above")
    dinov2_attn.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(
            vars(pristine.module(pristine.attention))[NAME](query, query, query), expected
        )


@pytest.mark.parametrize(
    "call",
    [
        lambda kernel, q: kernel(q, q[:, :2], q),  # keys and values of different length
        lambda kernel, q: kernel(q, q.half(), q),
        lambda kernel, q: kernel(q, q, q, p=2.0),
        lambda kernel, q: kernel(q[0], q, q),
        lambda kernel, q: kernel(q, q, q, attn_bias=torch.zeros(2)),
        lambda kernel, q: kernel(q, q, q, attn_bias="a mask"),
        lambda kernel, q: kernel(q, q, q, surprise=1),
        lambda kernel, q: kernel(q, q),
    ],
)
def test_errors_about_inputs_stay_xformers_own(pristine, call):
    query = noise(1, 4, 3, 64, seed=0)
    kernel = vars(pristine.module(pristine.attention))[NAME]
    with pytest.raises(Exception, match=".") as theirs:
        call(kernel, query)
    with pytest.raises(Exception, match=".") as ours:
        call(graft_kernel(kernel), query)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


@quiet
@pytest.mark.parametrize(
    "refusal",
    [
        "Operator `cutlassF` does not support inputs:",
        "Attention bias and Query/Key/Value should be",
    ],
)
def test_a_refusal_may_be_a_value_error(refusal):
    """Of an operator that upstream's first revision names; of a GPU's mask, with a model off it."""

    def kernel(*args, **kwargs):
        raise ValueError(refusal)

    assert_close(graft_kernel(kernel)(*inputs(3, 0)), definition(*inputs(3, 0)))


@pytest.mark.parametrize(
    "call",
    [
        lambda kernel, q: kernel(q[0], q[0], q[0]),  # xFormers takes (B, N, head_dim) too
        lambda kernel, q: kernel(q, q[:, :2], q),
        lambda kernel, q: kernel(q, q, q, "a mask"),
        lambda kernel, q: kernel(q, q, q, surprise=1),
    ],
)
def test_a_call_that_the_fallback_could_not_answer_ends_as_xformers_ends_it(call):
    with pytest.raises(NotImplementedError, match="No operator found"):
        call(graft_kernel(no_operator), noise(2, 4, 3, 64, seed=0))


# Installed and taken off


def test_upstream_runs_where_it_raised_and_warns_once(pristine):
    module = pristine.cls("MemEffAttention")(128, num_heads=2).eval()
    tokens = noise(1, 6, 128, seed=0)
    with pytest.raises(NotImplementedError, match="No operator found"):
        module(tokens)
    with dinov2_attn.install():
        with pytest.warns(
            KernelFallbackWarning, match="attention in float32 on cpu, so.*No operator found"
        ):
            output = module(tokens)
        assert_close(output, pristine.cls("Attention").forward(module, tokens))
        module(tokens)  # a second warning would be an error here
    with pytest.raises(NotImplementedError, match="No operator found"):
        module(tokens)


@pytest.mark.skipif(
    "MUTANT_UNDER_TEST" in os.environ,
    reason="mutmut's own frames stand between: every run without it looks",
)
def test_the_warning_names_the_line_that_called_the_kernel():
    with pytest.warns(KernelFallbackWarning) as caught:
        graft_kernel(no_operator)(*inputs(3, 0))
    assert [warning.filename for warning in caught] == [__file__]


def test_it_is_an_entry_of_the_registry_like_any_other(pristine):
    attention = pristine.module(pristine.attention)
    original = vars(attention)[NAME]
    dinov2_attn.install()
    assert f"dinov2.layers.attention.{NAME}" in dinov2_attn.status().grafted
    assert inspect.unwrap(vars(attention)[NAME]) is original
    assert dinov2_attn.install().__exit__() is None
    assert vars(attention)[NAME] is not original
    dinov2_attn.uninstall()
    assert vars(attention)[NAME] is original


def test_nothing_is_undone_where_somebody_patched_the_kernel_on_top(pristine):
    attention = pristine.module(pristine.attention)
    dinov2_attn.install()
    ours = vars(attention)[NAME]
    attention.memory_efficient_attention = no_operator
    with pytest.raises(PatchedOnTopError, match=f"layers.attention.{NAME}"):
        dinov2_attn.uninstall()
    attention.memory_efficient_attention = ours
    dinov2_attn.uninstall()
    assert vars(attention)[NAME] is not ours


@pytest.mark.parametrize("how", ["package", "model"])
def test_fallback_false_leaves_it_out(pristine, how):
    attention = pristine.module(pristine.attention)
    original = vars(attention)[NAME]
    model = pristine.cls("NestedTensorBlock")(
        8, num_heads=2, attn_class=pristine.cls("MemEffAttention")
    )
    target = None if how == "package" else model
    handle = dinov2_attn.install(target, fallback=False)
    assert vars(attention)[NAME] is original
    assert not any(NAME in name for name in dinov2_attn.status().grafted)
    with dinov2_attn.install(target):
        assert vars(attention)[NAME] is not original
    assert vars(attention)[NAME] is original
    with dinov2_attn.install(target, fallback=True), dinov2_attn.install(target, fallback=False):
        assert vars(attention)[NAME] is original
    handle.uninstall()
    assert not dinov2_attn.status().grafted


def test_what_two_targets_need_stays_for_the_second(pristine):
    attention = pristine.module(pristine.attention)
    model = pristine.cls("NestedTensorBlock")(
        8, num_heads=2, attn_class=pristine.cls("MemEffAttention")
    )
    package, live = dinov2_attn.install(), dinov2_attn.install(model)
    package.uninstall()
    assert hasattr(vars(attention)[NAME], "__wrapped__")
    live.uninstall()
    assert not hasattr(vars(attention)[NAME], "__wrapped__")


def test_a_reload_is_grafted_again(pristine):
    import importlib

    attention = pristine.module(pristine.attention)
    dinov2_attn.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.reload(attention)
    assert hasattr(vars(attention)[NAME], "__wrapped__")
    assert not hasattr(inspect.unwrap(vars(attention)[NAME]), "__wrapped__")
    dinov2_attn.uninstall()
    assert not hasattr(vars(attention)[NAME], "__wrapped__")


@quiet
def test_it_reaches_every_method_that_calls_the_kernel_by_its_module():
    """Without a flag, from a helper, as ``xops.memory_efficient_attention``."""
    with xformers_visibility.visible():
        import xformers.ops as xops

        class Attention(nn.Module):
            def __init__(self, dim, num_heads=8, qkv_bias=False):
                super().__init__()
                self.num_heads = num_heads
                self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

            def compute_attention(self, x):
                q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).unbind(2)
                return xops.memory_efficient_attention(k, q, v)

            def forward(self, x):
                return self.proj(self.compute_attention(x).flatten(2))

        kernel = xops.memory_efficient_attention
        module, tokens = Attention(12, num_heads=2), noise(2, 5, 12, seed=0)
        with dinov2_attn.install(module):
            assert module(tokens).shape == tokens.shape
            weights = module(tokens, return_attn=True)
            key, query, _ = reference.projections(module, tokens)
            scores = np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(6)
            powers = np.exp(scores)
            assert_close(
                weights,
                torch.from_numpy(powers / powers.sum(-1, keepdims=True)),
                dtype=weights.dtype,
            )
        assert xops.memory_efficient_attention is kernel
        with dinov2_attn.install(module, fallback=False), pytest.raises(NotImplementedError):
            module(tokens)
