"""Passes that go on from the recorded weights, and weights that are kept in another dtype."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dinov2_attn import edit, record, statistics
from dinov2_attn.errors import InvalidInputError, NotRecordedError, UnfaithfulError
from dinov2_attn.kernels import edited
from dinov2_attn.math import attention
from tests.support.edits import nothing_left
from tests.support.models_at_kernel import build as at_kernel
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits
from tests.support.xformers_visibility import quiet

FED = {"features": "from_weights"}


class Attention(nn.Module):
    """Attention that calls PyTorch's kernel with whatever it is given."""

    def __init__(self, shared=1, **options):
        super().__init__()
        self.num_heads, self.shared, self.options = 4, shared, options
        self.q, self.k, self.v = (nn.Linear(16, 16 // s) for s in (1, shared, shared))
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        gqa = {"enable_gqa": True} if self.shared > 1 else {}
        x = F.scaled_dot_product_attention(q, k, v, **self.options, **gqa)
        return x + self.proj(x.transpose(1, 2).flatten(2)).unflatten(-1, (4, 4)).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(Attention(**options) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).transpose(1, 2).flatten(2)
        return x


KINDS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bias": {"attn_mask": noise(1, 4, 7, 7, seed=5, dtype=torch.float64)},
    "one bias": {"attn_mask": noise(7, 7, seed=6, dtype=torch.float64)},
    "mask": {"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril(2)},
    "shared keys": {"shared": 2},
    "one key": {"shared": 4},
}

SELECTIONS = st.fixed_dictionaries(
    {
        "queries": st.sampled_from([None, 0, [-1, 0], slice(2, None)]),
        "heads": st.sampled_from([None, "mean"]),
        "dtype": st.sampled_from([None, torch.float32, torch.bfloat16]),
    }
)


@given(
    kind=st.sampled_from(sorted(KINDS)), chosen=SELECTIONS, grad=st.booleans(), both=st.booleans()
)
def test_features_and_weights_are_those_of_the_kernel(kind, chosen, grad, both):
    """Whatever it is given, and whatever is kept of it."""
    model = randomise(Model(**KINDS[kind]).double(), 2)
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        plain = model(tokens)
        with record(model, **chosen) as expected:
            model(tokens)
        outer = record(model) if both else record(model, queries=0)
        with nothing_left(model), outer, record(model, **chosen, **FED) as maps:
            first = model(tokens)
            maps.passes.clear()
            second = model(tokens)
    assert_close(first, plain)
    assert_close(second, plain)
    assert_all_close(maps.weights, expected.weights)
    for one, weights in zip(maps.weights, expected.weights, strict=True):
        assert one.dtype == weights.dtype == (chosen["dtype"] or torch.float64)
        assert one.requires_grad == weights.requires_grad == grad
        # Nothing larger is held by them.
        assert grad or one.untyped_storage().nbytes() == one.numel() * one.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_has_features_within_its_tolerance(dtype):
    model = randomise(Model().double(), 2).to(dtype)
    tokens = noise(3, 7, 16, seed=1).to(dtype)
    try:
        plain = model(tokens)
    except RuntimeError:
        pytest.skip("this torch multiplies no half precision on a CPU")
    with torch.no_grad(), record(model, **FED) as maps:
        assert_close(model(tokens), plain)
    assert maps.weights[0].dtype == dtype


class Viewing(Attention):
    """Attention that takes its heads together by a view, as fused kernels let it."""

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).view(*x.shape[::2], 16))


@pytest.mark.parametrize("grad", [True, False])
def test_heads_lie_side_by_side_as_in_the_output_of_a_fused_kernel(grad):
    model, tokens = randomise(Viewing(), 2), noise(3, 7, 16, seed=1)
    with torch.set_grad_enabled(grad):
        try:
            plain = model(tokens)
        except RuntimeError:
            pytest.skip("this torch has no fused kernel on a CPU")
        with record(model, **FED):
            assert_close(model(tokens), plain)
            assert_close(model(tokens), plain)
        for options in ({"heads": [1]}, {"keys": [1], "queries": [2]}, {"weights": lambda _, w: w}):
            with edit(model, **options):
                model(tokens)


class Pooling(Attention):
    """Attention from learned queries, which all samples or all heads share."""

    def __init__(self, samples, heads):
        super().__init__()
        self.learned = nn.Parameter(torch.empty(samples, heads, 2, 4))

    def forward(self, x):
        k, v = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.k, self.v))
        return F.scaled_dot_product_attention(self.learned, k, v)


@pytest.mark.parametrize(("samples", "heads"), [(1, 4), (3, 1), (1, 1)])
@torch.no_grad()
def test_queries_that_samples_or_heads_share(samples, heads):
    model = randomise(Pooling(samples, heads).double(), 2)
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float64)
    plain = model(tokens)
    assert plain.shape == (3, 4, 2, 4)
    with record(model, **FED):
        assert_close(model(tokens), plain)
        assert_close(model(tokens), plain)
    with edit(model, heads=[1]):
        edited = model(tokens)
    assert not edited[:, 1].any()
    assert_close(edited[:, [0, 2, 3]], plain[:, [0, 2, 3]])


def test_the_features_are_those_of_the_recorded_weights():
    """Also where these were replaced: the product is of what is recorded."""
    model = randomise(Model().double(), 2)
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float64)
    with record(model, **FED), edit(model, weights=lambda _, weights: weights.flip(1)):
        inner = model(tokens)
    with edit(model, weights=lambda _, weights: weights.flip(1)), record(model, **FED) as maps:
        outer = model(tokens)
    with edit(model, weights=lambda _, weights: weights.flip(1)), record(model) as expected:
        assert_close(model(tokens), inner)
    assert_close(outer, inner)
    assert_all_close(maps.weights, expected.weights)
    with edit(model, keys=[1, 2]), record(model, **FED) as maps:
        hidden = model(tokens)
    with edit(model, keys=[1, 2]), record(model) as expected:
        assert_close(model(tokens), hidden)
    assert_all_close(maps.weights, expected.weights)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"heads": 0}, {"keys": [1]}])
def test_weights_in_half_precision_are_for_those_who_asked(options):
    """An edit inside, another recording and statistics have the kernel's numbers."""
    model = randomise(Model(), 2)
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float32)
    with edit(model, **options), record(model, statistics="entropy") as expected:
        features = model(tokens)
    with (
        record(model) as other,
        record(model, statistics="entropy", dtype=torch.float16, **FED) as maps,
        edit(model, **options),
    ):
        assert_close(model(tokens), features)
    assert maps.weights[0].dtype == torch.float16
    assert other.weights[0].dtype == torch.float32
    assert_all_close(other.weights, expected.weights)
    assert_close(maps.statistics["entropy"][0], expected.statistics["entropy"][0])


@torch.no_grad()
def test_a_recording_does_not_write_into_frozen_maps():
    model = randomise(Model().double(), 2)
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float64)
    with record(model) as frozen:
        plain = model(tokens)
    with edit(model, frozen=frozen), record(model, reduce=lambda _, weights: weights.mul_(0.5)):
        assert_close(model(tokens), plain)
        assert_close(model(tokens), plain)


class Kernels(torch.overrides.TorchFunctionMode):
    """Counts calls of PyTorch's kernel, and changes what it returns by a factor."""

    def __init__(self, factor=1):
        super().__init__()
        self.factor, self.calls = factor, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return out
        self.calls += 1
        return out * self.factor


@pytest.mark.parametrize("grad", [True, False])
def test_the_kernel_runs_once_for_the_proof_and_never_again(grad):
    model, counts = randomise(Model().double(), 2), []
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float64)
    for _ in range(3):
        with torch.set_grad_enabled(grad), Kernels() as kernels, record(model, **FED):
            model(tokens)
        counts.append(kernels.calls)
    assert counts == [2, 0, 0]


def test_who_wants_no_proof_gets_none():
    model = randomise(Model().double(), 2)
    with Kernels() as kernels, record(model, check=False, **FED) as maps:
        model(noise(3, 7, 16, seed=1, dtype=torch.float64))
    assert kernels.calls == 0
    assert len(maps.weights) == 2


@torch.no_grad()
def test_a_question_inside_is_answered_by_the_kernel():
    """And a pass after it goes on from the weights again."""
    model = nn.Sequential(nn.Flatten(1, 2), randomise(Model().double(), 2))
    tokens = noise(3, 7, 1, 16, seed=1, dtype=torch.float64)
    outside = statistics(model, tokens, "entropy")
    with record(model, check=False, **FED):
        with Kernels() as kernels:
            inside = statistics(model, tokens, "entropy")
        assert kernels.calls == 2
        with Kernels() as kernels:
            model(tokens)
        assert kernels.calls == 0
    for ours, expected in zip(inside["entropy"], outside["entropy"], strict=True):
        assert_same_bits(ours, expected)


def test_a_frozen_model_is_recorded_as_without_grad(monkeypatch):
    """What nothing differentiates is made in tiles, though grad mode is on."""
    model = randomise(Model(), 2).float().requires_grad_(False)
    tokens, tiled = noise(3, 7, 16, seed=1).float(), []
    for module, name in ((attention, "softmax_into"), (edited, "weights_and_output")):
        real = getattr(module, name)
        spy = lambda *args, real=real, **options: (tiled.append(real), real(*args, **options))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    for options in ({}, FED):
        with torch.no_grad(), record(model, **options) as expected:
            model(tokens)
        tiled.clear()
        with record(model, check=False, **options) as maps:
            model(tokens)
        assert len(tiled) >= 2
        for ours, weights in zip(maps.weights, expected.weights, strict=True):
            assert_same_bits(ours, weights)
    with record(model, check=False) as maps:
        model(tokens.requires_grad_())
    assert maps.weights[0].requires_grad


def test_an_unfaithful_kernel_is_found_before_anything_goes_on():
    model = randomise(Model().double(), 2)
    with Kernels(2), pytest.raises(UnfaithfulError, match="Attention"), record(model, **FED):
        model(noise(1, 7, 16, seed=1, dtype=torch.float64))


class Explicit(Attention):
    """The same in explicit code."""

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = F.dropout((q @ k.transpose(-2, -1) / 2).softmax(-1), 0.5, self.training)
        return x + self.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("training", [True, False])
def test_explicit_code_is_as_ever(training):
    """It multiplies its own weights anyway, dropped or not."""
    model = nn.Sequential(Explicit(), Explicit()).train(training)
    tokens = noise(3, 7, 16, seed=1)
    torch.manual_seed(0)
    plain = model(tokens)
    torch.manual_seed(0)
    with record(model, **FED) as maps:
        assert_same_bits(model(tokens), plain)
    assert len(maps.weights) == 2


@torch.no_grad()
def test_upstream_is_recorded_so(models):
    model = build(models)
    plain = model.forward_features(IMAGES)["x_norm_patchtokens"]
    with record(model) as expected:
        model(IMAGES)
    with record(model, **FED) as maps:
        fed = model.forward_features(IMAGES)["x_norm_patchtokens"]
    assert_close(fed, plain)
    assert_all_close(maps.weights, expected.weights)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"causal": True}])
def test_attention_that_its_projection_does_not_decide(first, options):
    model = at_kernel(first, **options)
    images = noise(2, 3, 8, 8, seed=1, dtype=torch.float64)
    with record(model) as expected:
        plain = model(images)
    with record(model, **FED) as maps:
        assert_close(model(images), plain)
    assert_all_close(maps.weights, expected.weights)


@quiet
@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_nested_lists_of_xformers(nested, dtype):
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model = build(nested, block_fn=block)
    images = [IMAGES, noise(1, 3, 4, 4, seed=3, dtype=torch.float64)]

    def run():
        tokens = [model.prepare_tokens_with_masks(batch) for batch in images]
        for one in model.blocks:
            tokens = one(tokens)
        return tokens

    with record(model) as expected:
        plain = run()
    for _ in range(2):
        with record(model, dtype=dtype, **FED) as maps:
            assert_all_close(run(), plain)
        for found, wanted in zip(maps.passes, expected.passes, strict=True):
            for one, other in zip(found.weights, wanted.weights, strict=True):
                assert one.dtype == (dtype or torch.float64)
                assert_close(one, other, dtype=torch.float32)


def test_gradients_flow_through_the_weights_into_the_features():
    model = randomise(Model().double(), 2)
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(model(tokens).square().sum(), tokens)
    with record(model, **FED) as maps:
        output = model(tokens)
    (found,) = torch.autograd.grad(output.square().sum(), tokens, retain_graph=True)
    assert_close(found, expected)
    (by_weights,) = torch.autograd.grad(output.square().sum(), maps.weights[-1], retain_graph=True)
    with record(model, gradients=True) as plain:
        model(tokens).square().sum().backward()
    assert_close(by_weights, plain.gradients[-1])
    with record(model, gradients=True, **FED) as maps:
        model(tokens).square().sum().backward()
    assert_all_close(maps.gradients, plain.gradients)
    assert not maps.weights[0].requires_grad


def test_checkpointing_inside_the_block():
    model = randomise(Model().double(), 2)
    tokens = noise(3, 7, 16, seed=1, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(model(tokens).square().sum(), tokens)
    with record(model, **FED):
        output = checkpoint(model, tokens, use_reentrant=False)
        (found,) = torch.autograd.grad(output.square().sum(), tokens)
    assert_close(found, expected)


def test_autocast_keeps_the_dtype_of_the_kernel():
    model = randomise(Model(), 2).float()
    tokens = noise(3, 7, 16, seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with record(model) as expected:
            plain = model(tokens)
        with record(model, **FED) as maps:
            fed = model(tokens)
    assert fed.dtype == plain.dtype
    assert_close(fed, plain, dtype=torch.bfloat16)
    assert [one.dtype for one in maps.weights] == [one.dtype for one in expected.weights]


def test_a_kernel_with_dropout_is_refused():
    model = Model(dropout_p=0.5)
    with (
        nothing_left(model),
        pytest.raises(InvalidInputError, match="drops some with probability 0.5"),
        record(model, **FED),
    ):
        model(noise(1, 7, 16, seed=1))


def test_a_graph_raises_as_for_any_recording():
    model = randomise(Model(), 2).float()
    tokens = noise(1, 7, 16, seed=1)
    with pytest.raises(NotRecordedError, match="eager mode"), record(model, **FED):
        torch.func.vmap(model)(tokens[None])


def test_other_layers_keep_their_kernel(first):
    model = build(first)
    with torch.no_grad(), record(model, [2]) as expected:
        plain = model.blocks[1](model.blocks[0](noise(1, 5, 8, seed=1, dtype=torch.float64)))
        model(IMAGES)
    with torch.no_grad(), record(model, [2], **FED) as maps:
        fed = model.blocks[1](model.blocks[0](noise(1, 5, 8, seed=1, dtype=torch.float64)))
        model(IMAGES)
    assert_same_bits(fed, plain)
    assert_all_close(maps.weights, expected.weights)


def test_reduce_and_facets_see_the_same(first):
    model = build(first)
    options = {"facets": ("key", "value"), "reduce": lambda layer, w: (layer, w.amax(-1))}
    with torch.no_grad(), record(model, **options) as expected:
        model(IMAGES)
    with torch.no_grad(), record(model, **options, **FED) as maps:
        model(IMAGES)
    for (layer, found), (other, wanted) in zip(maps.weights, expected.weights, strict=True):
        assert layer == other
        assert_close(found, wanted)
    assert_all_close(maps.facets["key"], expected.facets["key"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [None, "mean"])
@pytest.mark.parametrize("grad", [True, False])
def test_weights_are_kept_in_the_dtype_that_is_asked_for(models, dtype, heads, grad):
    model = build(models)
    with torch.set_grad_enabled(grad):
        with record(model, heads=heads) as expected:
            plain = model(IMAGES)
        seen = []
        with record(
            model, heads=heads, dtype=dtype, reduce=lambda _, w: seen.append(w) or w
        ) as maps:
            assert_same_bits(model(IMAGES), plain)
    for found, wanted in zip(maps.weights, expected.weights, strict=True):
        assert found.dtype == dtype
        assert found.requires_grad == wanted.requires_grad
        assert_same_bits(found, wanted.to(dtype))
    assert {one.dtype for one in seen} == {dtype}
    assert maps[0].to("cpu").weights[0].dtype == dtype


@pytest.mark.parametrize("wrong", [torch.int8, torch.complex64, "float16", 2])
def test_other_dtypes_are_refused(first, wrong):
    with (
        pytest.raises(InvalidInputError, match="dtype as one of"),
        record(build(first), dtype=wrong),
    ):
        pass


@pytest.mark.parametrize("wrong", ["weights", None, True])
def test_other_sources_of_features_are_refused(first, wrong):
    with (
        pytest.raises(InvalidInputError, match="from_kernel"),
        record(build(first), features=wrong),
    ):
        pass


def test_bits_of_features_may_differ_and_only_then(first):
    """The default is exact."""
    model = build(first)
    plain = model(IMAGES)
    with record(model, features="from_kernel"):
        assert same_bits(model(IMAGES), plain)
