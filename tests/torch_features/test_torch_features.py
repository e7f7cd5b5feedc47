"""PyTorch's ways to run a module work on grafted models as on upstream's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, vmap

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import NotRecordedError
from tests.support.bit_identity import assert_unchanged, one_pass
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.tolerances import are_close, assert_close, assert_same_bits

SQUARE = IMAGES[..., :4]  # of the training size: nothing is interpolated


class Last(nn.Module):
    """Asks: a trace needs a module whose parameters these are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner.get_last_self_attention(x)


def asked(model, images):
    """Return the last weights, asked for in each of three ways."""
    with record(model, 1) as maps:
        model(images)
    (_, attentions) = model(images, return_attention=True)
    return [model.get_last_self_attention(images), attentions[-1], maps.weights[0]]


def test_autocast(first):
    model = build(first).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_unchanged(lambda: one_pass(model, IMAGES.float()))
        with dinov2_attn.install():
            assert {w.dtype for w in asked(model, IMAGES.float())} == {torch.bfloat16}
            # Nothing that was asked is left in autocast's cache of weights.
            before = one_pass(model, IMAGES.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(one_pass(model, IMAGES.float()), before)


def test_inference_mode(first):
    model = build(first)
    with torch.inference_mode():
        assert_unchanged(lambda: one_pass(model))
    with dinov2_attn.install():
        expected = model.get_last_self_attention(IMAGES)
        with torch.inference_mode():
            answers = asked(model, IMAGES)
            assert all(answer.is_inference() for answer in answers)
        assert_all_close([a.clone() for a in answers], [expected] * 3)
        model.get_last_self_attention(IMAGES).sum().backward()  # nothing of it stays behind


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a fused kernel in a loop
def test_vmap(first):
    model, images = build(first), IMAGES[:, None]
    run = vmap(model, randomness="error")
    with torch.no_grad():
        assert_unchanged(lambda: [run(images)])
        with dinov2_attn.install():
            weights = vmap(model.get_last_self_attention)(images)
            assert_close(weights[:, 0], model.get_last_self_attention(IMAGES))
            with pytest.raises(NotRecordedError, match="torch.func"), record(model):
                run(images)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch itself uses it
@pytest.mark.parametrize("grad", [True, False])
def test_tangents_of_forward_mode_reach_the_weights(first, grad):
    """``no_grad`` does not switch them off, and what is written in place has none."""
    model = build(first)

    def tangents(run):
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            outputs = run(model, forward_ad.make_dual(IMAGES, torch.ones_like(IMAGES)))
            return [forward_ad.unpack_dual(out).tangent.detach().clone() for out in outputs]

    try:
        assert_unchanged(lambda: tangents(lambda m, x: [m(x)]))
    except NotImplementedError:
        pytest.skip("upstream's fused kernel has no tangents here: that of PyPI's first commit has")
    with dinov2_attn.install():
        step = 1e-6
        higher, lower = (model.get_last_self_attention(IMAGES + e) for e in (step, -step))
        slope = ((higher - lower) / (2 * step)).detach()
        for tangent in tangents(asked):
            assert_close(tangent, slope, within=1e-7)  # of a difference quotient


def test_functional_call(first):
    """Parameters of another model, for one call."""
    model, other = build(first), build(first)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    theirs = dict(other.named_parameters())
    assert_unchanged(lambda: [functional_call(model, theirs, (IMAGES,))])
    with dinov2_attn.install(), record(model) as maps:
        options = {"return_attention": True}
        _, attentions = functional_call(model, theirs, (IMAGES,), options)
    with dinov2_attn.install():
        expected = other.get_self_attention(IMAGES)
        assert_close(attentions, expected)
        assert_all_close(maps.weights, expected)
        assert not are_close(expected[0], model.get_self_attention(IMAGES)[0])


def test_gradients_of_a_function(grafted):
    """torch.func differentiates a pass that is asked as backward() does."""
    model = build(grafted, depth=2)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        output, attentions = functional_call(
            model, parameters, (SQUARE,), {"return_attention": True}
        )
        return output.square().sum() + sum(weights.square().sum() for weights in attentions)

    loss(parameters).backward()
    gradients = torch.func.grad(loss)(parameters)
    for name, parameter in parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(gradients[name], expected)


@pytest.mark.parametrize("grad", [True, False])
def test_meta_tensors_have_the_shapes(first, grad):
    model, images = build(first).to("meta"), IMAGES.to("meta")
    before = model(images)
    with dinov2_attn.install(), torch.set_grad_enabled(grad):
        assert model(images).shape == before.shape
        for weights in asked(model, images):
            assert weights.device.type == "meta"
            assert weights.shape == (2, 2, 7, 7)
        few = model.get_last_self_attention(images, queries=[0, 2], heads="mean")
        assert few.shape == (2, 2, 7)


@pytest.mark.parametrize("grad", [True, False])
def test_fake_tensors_have_the_shapes(first, grad):
    model = build(first)
    with dinov2_attn.install(), torch.set_grad_enabled(grad):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            images = mode.from_tensor(SQUARE)
            assert model(images).shape == (2, 8)
            for weights in asked(model, images):
                assert type(weights) is type(images)
                assert weights.shape == (2, 2, 5, 5)
        assert_all_close(asked(model, SQUARE), [model.get_last_self_attention(SQUARE)] * 3)


@pytest.mark.filterwarnings("ignore")  # the tracer's, at upstream's own assertions
def test_traces(first):
    # Another batch: what was written in place would have kept the size of the first.
    model, other = build(first), torch.cat([SQUARE * 2, SQUARE])
    trace = lambda function: torch.jit.trace(function, (SQUARE,), check_trace=False)  # noqa: E731

    def nodes():
        return [node.kind() for node in trace(model).inlined_graph.nodes()]

    before = nodes()
    assert_unchanged(lambda: [trace(model)(other)])
    with dinov2_attn.install():
        assert nodes() == before
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                weights = trace(Last(model))(other)
                assert_close(weights, model.get_last_self_attention(other))
        with record(model) as maps:
            traced = trace(model)
        assert_all_close(maps.weights, model.get_self_attention(SQUARE))
        assert_close(traced(other), model(other))
        with pytest.raises(NotRecordedError, match="Found 0"), record(model):
            traced(other)


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated in new torch
def test_scripted_attention(first):
    """TorchScript reads the source behind a graft: features, and no question."""
    attention = first.cls("Attention")(8, 2)
    tokens = torch.ones(1, 3, 8)
    try:
        torch.jit.script(attention)
    except RuntimeError:
        pytest.skip("upstream's newest attention is no TorchScript: PyPI's first commit is")
    assert_unchanged(lambda: [torch.jit.script(attention)(tokens)])


def test_data_parallel_falls_through_on_a_cpu(first):
    model = nn.DataParallel(build(first))
    assert_unchanged(lambda: one_pass(model))
    with dinov2_attn.install():
        output, attentions = model(IMAGES, return_attention=True)
        assert_close(output, model(IMAGES))
        assert_close(attentions, model.module.get_self_attention(IMAGES))
