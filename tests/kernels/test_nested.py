"""Lists through xFormers' nested path: the same attention as one by one, and of that pass.

Real xFormers and its masks; where it has no kernel (any CPU) over the fallback that install
sets. ``proj(weights @ v)`` of every segment is compared with upstream's own nested output.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.functional import dropout

from dinov2_attn.errors import NoOperatorError
from dinov2_attn.kernels.xformers import check_stochastic_depth
from tests.support import reference, subprocesses, upstreams, xformers_visibility
from tests.support.compiling import compiles
from tests.support.recordings import IMAGES, build
from tests.support.strategies import model_cases, noise, randomise, seeds
from tests.support.tolerances import assert_close, assert_same_bits
from tests.support.xformers_visibility import devices, quiet

pytestmark = quiet

lists = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
ON_CUDA = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def tokens_of(shapes, dim, seed, dtype=torch.float64):
    return [noise(b, n, dim, seed=seed + i, dtype=dtype) for i, (b, n) in enumerate(shapes)]


def block_of(upstream, *, heads=3, dim=24, seed=0, dtype=torch.float64, **options):
    attn_class = upstream.cls("MemEffAttention")
    block = upstream.cls("NestedTensorBlock")(
        dim, heads, qkv_bias=True, attn_class=attn_class, init_values=1.0, **options
    )
    return randomise(block.double(), seed).to(dtype)


def nest(upstream, tokens):
    """Upstream's own mask and concatenation."""
    return upstream.module(upstream.block).get_attn_bias_and_cat(tokens)


@given(shapes=lists, heads=st.integers(1, 4), dtype=dtypes, seed=seeds, grad=st.booleans())
def test_each_element_of_the_list_has_its_weights(nested, shapes, heads, dtype, seed, grad):
    module = block_of(nested, heads=heads, dim=8 * heads, seed=seed, dtype=dtype).attn
    tokens = tokens_of(shapes, 8 * heads, seed, dtype)
    bias, together = nest(nested, tokens)
    with torch.set_grad_enabled(grad):
        weights = module(together, attn_bias=bias, return_attn=True)
    assert [tuple(w.shape) for w in weights] == [(b, heads, n, n) for b, n in shapes]
    for ours, x in zip(weights, tokens, strict=True):
        assert ours.dtype == dtype
        assert ours.requires_grad == grad
        assert_close(ours, reference.weights(module, x))


@given(shapes=lists, dtype=dtypes, seed=seeds)
def test_weights_times_values_are_upstreams_own_nested_output(nested, shapes, dtype, seed):
    _faithful(nested, shapes, dtype, seed, "cpu")


@pytest.mark.parametrize("device", devices[1:])
@given(shapes=lists, dtype=ON_CUDA, seed=seeds)
def test_weights_are_those_of_the_real_kernels(nested, device, shapes, dtype, seed):
    _faithful(nested, shapes, dtype, seed, device)


def _faithful(nested, shapes, dtype, seed, device):
    module = block_of(nested, seed=seed, dtype=dtype).attn.to(device)
    tokens = [x.to(device) for x in tokens_of(shapes, 24, seed, dtype)]
    bias, together = nest(nested, tokens)
    outputs = bias.split(module(together, attn_bias=bias))
    weights = module(together, attn_bias=bias, return_attn=True)
    module = module.cpu()
    for x, ours, output in zip(tokens, weights, outputs, strict=True):
        size = reference.size_of_terms(module, x.cpu())
        expected = reference.features(module, x.cpu(), ours.cpu())
        assert_close(expected, output.cpu(), dtype=dtype, size=size)


@given(shapes=lists, seed=seeds, grad=st.booleans())
def test_a_block_answers_a_list_with_the_weights_of_its_own_nested_pass(nested, shapes, seed, grad):
    block, tokens = block_of(nested, seed=seed), tokens_of(shapes, 24, seed)
    calls = []
    hook = block.attn.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append((*args, kwargs["attn_bias"])), with_kwargs=True
    )
    block(tokens)
    hook.remove()
    ((together, bias),) = calls
    with torch.set_grad_enabled(grad):
        own = block.attn(together, attn_bias=bias, return_attn=True)
        answers = block(tokens, return_attention=True)
    for x, a, b in zip(tokens, answers, own, strict=True):
        assert_close(a, b)
        assert_close(a, block(x, return_attention=True))


def test_the_cache_of_biases_is_read_and_not_written(nested):
    block, tokens = block_of(nested), tokens_of([(2, 5), (1, 3)], 24, 0)
    cache = nested.module(nested.block).attn_bias_cache
    cache.clear()
    block(tokens, return_attention=True)
    assert not cache
    bias, together = nest(nested, tokens)
    before = dict(vars(bias))
    block.attn(together, attn_bias=bias, return_attn=True)
    assert list(cache.values()) == [bias]
    assert vars(bias) == before


@given(case=model_cases(), count=st.integers(1, 3), masked=st.booleans(), seed=seeds)
def test_a_models_list_goes_through_upstreams_nested_pass(nested, case, count, masked, seed):
    model = case.build(nested)
    images = [noise(1 + i, 3, 2 + 2 * i, 4, seed=seed + i, dtype=case.dtype) for i in range(count)]
    masks = [noise(len(x), x[0, 0].numel() // 4, seed=9) > 0 for x in images] if masked else None
    nestings = []
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args, kwargs: nestings.append(kwargs.get("attn_bias")), with_kwargs=True
        )
        for m in model.modules()
        if hasattr(m, "qkv")
    ]
    ask = partial(model.get_self_attention, queries="patches", heads="mean")
    lists = ask(images, masks=masks)
    # All but the last block ran nested; the weights themselves are asked tensor by tensor.
    assert sum(bias is not None for bias in nestings) == case.depth - 1
    for hook in hooks:
        hook.remove()
    for i, x in enumerate(images):
        one = ask(x, masks=None if masks is None else masks[i])
        for layer in range(case.depth):
            assert_close(lists[layer][i], one[layer])


@given(case=model_cases(), seed=seeds)
def test_features_and_attentions_of_a_list_come_from_one_nested_pass(nested, case, seed):
    model = case.build(nested)
    images = [case.images, noise(2, 3, 2, 6, seed=seed, dtype=case.dtype)]
    if nested is upstreams.MOGE:  # its own forward_features_list unpacks three of two
        with pytest.raises(ValueError, match="unpack"):
            model.forward_features(images, [None, None])
        with pytest.raises(ValueError, match="unpack"):
            model.forward_features(images, return_attention=True)
        return
    plain = model.forward_features(images, [None, None])
    asked = model.forward_features(images, return_attention=True)
    output, attentions = model(images, is_training=True, return_attention=True)
    lists = model.get_self_attention(images)
    for i in range(2):
        for name in ("x_prenorm", "x_norm_clstoken"):
            assert_same_bits(asked[i][name], plain[i][name])
            assert_same_bits(output[i][name], plain[i][name])
        for layer in range(case.depth):
            assert_close(asked[i]["attentions"][layer], lists[layer][i])
            assert_close(attentions[layer][i], lists[layer][i])


@given(shapes=lists, seed=seeds, data=st.data())
def test_a_poisoned_neighbour_leaves_the_others_untouched(nested, shapes, seed, data):
    """Rows never cross a segment: not even NaN does."""
    block, tokens = block_of(nested, seed=seed), tokens_of(shapes, 24, seed)
    bias, together = nest(nested, tokens)
    clean = block.attn(together, attn_bias=bias, return_attn=True)
    ill = data.draw(st.integers(0, len(tokens) - 1))
    sample = data.draw(st.integers(0, len(tokens[ill]) - 1))
    tokens[ill][sample] = float("nan")
    _, together = nest(nested, tokens)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            weights = block.attn(together, attn_bias=bias, return_attn=True)
            features = block(tokens)
        for i, x in enumerate(tokens):
            for j in range(len(x)):
                if (i, j) == (ill, sample):
                    assert weights[i][j].isnan().all()
                else:
                    assert_close(weights[i][j], clean[i][j])
                    assert not features[i][j].isnan().any()


@given(shapes=lists, seed=seeds)
def test_rows_of_every_element_are_selected_and_heads_averaged(nested, shapes, seed):
    module = block_of(nested, seed=seed).attn
    bias, together = nest(nested, tokens_of(shapes, 24, seed))
    ask = partial(module, together, attn_bias=bias, return_attn=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            some = ask(queries=[-1, 0], heads="mean")
            for ours, full in zip(some, ask(), strict=True):
                assert_close(ours, full[:, :, [-1, 0]].mean(1))


def test_gradients_reach_every_element(nested):
    block, tokens = block_of(nested), tokens_of([(2, 3), (1, 4)], 24, 0)
    for x in tokens:
        x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *xs: block(list(xs), return_attention=True), tokens, fast_mode=True
    )


# Training


def test_drop_path_of_zero_nests_in_training(nested):
    block, tokens = block_of(nested).train(), tokens_of([(2, 5), (1, 3)], 24, 0)
    expected = [block.eval()(x, return_attention=True) for x in tokens]
    answers = block.train()(tokens, return_attention=True)
    for a, b in zip(answers, expected, strict=True):
        assert_close(a, b)
    assert [x.shape for x in block(tokens)] == [x.shape for x in tokens]


def test_what_a_list_draws_in_training_is_drawn_as_unasked(nested):
    """LoRA's dropout, which the weights draw first and the pass itself again."""
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model = build(nested, block_fn=block).train()
    for one in model.blocks:
        one.attn.qkv.register_forward_hook(lambda m, _, out: dropout(out, 0.5, m.training))
    if nested is upstreams.MOGE:
        pytest.skip("its own forward_features_list unpacks three of two; the other copies run")
    for images in ([IMAGES, IMAGES[:1, :, :2]], [IMAGES]):
        torch.manual_seed(3)
        plain = model.forward_features(images, [None] * len(images))
        torch.manual_seed(3)
        asked = model.forward_features(images, return_attention=True)
        for a, b in zip(asked, plain, strict=True):
            assert_same_bits(a["x_prenorm"], b["x_prenorm"])


def test_stochastic_depth_of_a_list_on_a_cpu_is_said_to_need_cuda(nested):
    block, tokens = block_of(nested, drop_path=0.3).train(), tokens_of([(2, 5), (1, 3)], 24, 0)
    with pytest.raises(NoOperatorError, match=r"(?s)CUDA only\.\nFound .* drop path of 0\.3"):
        block(tokens, return_attention=True)
    assert block(tokens[0], return_attention=True).shape == (2, 3, 5, 5)
    assert block.eval()(tokens, return_attention=True)[1].shape == (1, 3, 3, 3)


def test_stochastic_depth_of_a_list_on_cuda_is_left_to_xformers(nested):
    block = block_of(nested, drop_path=0.3).train()
    try:
        with FakeTensorMode():  # of any device, on a machine that has none
            tokens = [torch.empty(size, 5, 24, device="cuda") for size in (2, 1)]
    except (RuntimeError, AssertionError):
        pytest.skip("old torch needs a GPU to fake one: newer ones run this anywhere")
    check_stochastic_depth(block, tokens)
    with pytest.raises(NoOperatorError, match="a list on cpu, cuda"):
        check_stochastic_depth(block, [*tokens, torch.empty(1, 3, 24)])


@pytest.mark.parametrize("ask", ["get_self_attention", "get_last_self_attention", "features"])
def test_a_model_says_so_before_anything_runs(nested, ask):
    model = nested.cls("DinoVisionTransformer")(
        img_size=4,
        patch_size=2,
        embed_dim=8,
        depth=2,
        num_heads=2,
        drop_path_rate=0.4,
        block_fn=partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention")),
    ).train()
    images = [noise(2, 3, 4, 4, seed=0), noise(1, 3, 2, 4, seed=1)]
    ran = []
    hook = model.blocks.register_forward_pre_hook(lambda *_: ran.append(1))
    calls = {"features": partial(model.forward_features, return_attention=True)}
    with pytest.raises(NoOperatorError, match="CUDA only"):
        calls.get(ask, getattr(model, ask, None))(images)
    hook.remove()
    assert not ran
    assert len(model.eval().get_self_attention(images)) == 2


# Dynamo finds upstream's modules by name, which two imports of them in one process share.
COMPILE = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = sys.argv[1:]
import torch, dinov2_attn
from dinov2_attn.proof.conformance.tolerances import assert_close
dinov2_attn.install()
from dinov2.layers import MemEffAttention, NestedTensorBlock
block = NestedTensorBlock(24, 3, attn_class=MemEffAttention).eval()
tokens = [torch.randn(2, 5, 24), torch.randn(1, 3, 24)]
with torch.no_grad():
    for asked in ({}, {"return_attention": True}):
        compiled = torch.compile(lambda t: block(t, **asked), backend="eager", fullgraph=True)
        assert_close(compiled(tokens), block(tokens, **asked))
print("compiled")
"""


@pytest.mark.skipif(not compiles(), reason="this torch cannot compile on this Python")
def test_a_nested_pass_and_its_weights_compile_into_one_graph(tmp_path):
    with xformers_visibility.visible():
        pass
    script = tmp_path / "script.py"
    script.write_text(COMPILE)
    path = upstreams.CHECKOUT or upstreams.fetch_wheel(upstreams.FIRST.wheel)
    done = subprocesses.python(script, path, cwd=tmp_path)
    assert done.stdout == "compiled\n", done.stderr
