"""What people put at ``qkv`` and around it: hooks, adapters, parametrisations, own classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import IncompatibleUpstreamError, NotGraftedError
from tests.support import reference
from tests.support.bit_identity import assert_unchanged, one_pass
from tests.support.recordings import IMAGES, Adapted, assert_all_close, build
from tests.support.tolerances import are_close, assert_close, assert_same_bits


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def on_qkv(change):
    def apply(model):
        for block in model.blocks:
            change(block.attn.qkv)

    return apply


def replaced(make):
    def apply(model):
        for block in model.blocks:
            block.attn.qkv = make(block.attn.qkv)

    return apply


def weight_norm(where):
    """Direction and length apart: the lengths are changed, or it would be what it was."""

    def normalise(qkv):
        getattr(where, "weight_norm", nn.utils.weight_norm)(qkv)  # torch 2.0 has the older alone
        for name, parameter in qkv.named_parameters():
            if name.endswith(("original0", "weight_g")):
                parameter.data *= 1.5

    return normalise


WAYS = {
    "forward hook": on_qkv(lambda qkv: qkv.register_forward_hook(lambda m, a, out: out * 1.5)),
    "pre hook": on_qkv(lambda qkv: qkv.register_forward_pre_hook(lambda m, a: (a[0] * 1.5,))),
    "keyword hook": on_qkv(
        lambda qkv: qkv.register_forward_hook(lambda m, a, k, out: out + 1, with_kwargs=True)
    ),
    "backward hook": on_qkv(
        lambda qkv: qkv.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))
    ),
    "backward pre hook": on_qkv(
        lambda qkv: qkv.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,))
    ),
    "adapter": replaced(Adapted),
    "sequence": replaced(lambda qkv: nn.Sequential(qkv, nn.Tanh())),
    "weight norm": on_qkv(weight_norm(parametrizations)),
    "spectral norm": on_qkv(parametrizations.spectral_norm),
    "orthogonal": on_qkv(parametrizations.orthogonal),
    "older weight norm": on_qkv(weight_norm(nn.utils)),
    "older spectral norm": on_qkv(lambda qkv: nn.utils.spectral_norm(qkv)),
    "parametrisation": on_qkv(
        lambda qkv: parametrize.register_parametrization(qkv, "weight", Doubled())
    ),
    "pruned": on_qkv(lambda qkv: prune.l1_unstructured(qkv, "weight", amount=0.5)),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.* is deprecated", "ignore:Full backward hook is firing"
)


def changed(upstream, way, *, training=False):
    torch.manual_seed(0)
    model = build(upstream)
    WAYS[way](model)
    return model.train(training)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_features_and_gradients_are_unchanged(first, way, training):
    """In training spectral norm iterates at every call: one too many would show."""
    assert_unchanged(lambda: one_pass(changed(first, way, training=training)))

    def recorded():
        model = changed(first, way, training=training)
        model.zero_grad()
        with record(model):
            output = model(IMAGES)
        output.square().sum().backward()
        return [output, *(p.grad for p in model.parameters() if p.grad is not None)]

    with dinov2_attn.install():
        assert_same_bits(recorded(), one_pass(changed(first, way, training=training)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grad", [True, False])
def test_weights_are_those_of_what_is_there(first, way, grad):
    model, seen = changed(first, way), []
    plain = build(first)
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
    model(IMAGES)
    expected = [reference.weights(module, tokens) for module, tokens in seen]
    with dinov2_attn.install(), torch.set_grad_enabled(grad):
        with record(model) as maps:
            model(IMAGES)
        both = model(IMAGES, return_attention=True)[1]
        for answers in (model.get_self_attention(IMAGES), both, maps.weights):
            assert_all_close(answers, expected)
        few = model.get_last_self_attention(IMAGES, queries="cls")
        assert_close(few, expected[-1][:, :, :1])
        if "backward" not in way:
            assert not are_close(expected[0], plain.get_self_attention(IMAGES)[0])


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated in new torch
def test_a_quantised_projection(first):
    quantise = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantise is None or "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no dynamic quantisation here: hooks and adapters take the same way")
    model = quantise(build(first).float(), {nn.Linear}, torch.qint8)
    images = IMAGES.float()
    assert_unchanged(lambda: [model(images)])
    with dinov2_attn.install():
        weights = model.get_self_attention(images)
        with record(model) as maps:
            _, both = model(images, return_attention=True)
        assert_close(both, weights)
        assert_close(maps.weights, weights)
        exact = build(first).float().get_self_attention(images)
        assert not are_close(weights[0], exact[0])
        assert_close(weights[0], exact[0], within=0.05)


def test_the_same_block_twice_is_two_layers(first):
    """Weights of each of its runs, where they can be told apart; recording says they cannot."""
    model, other = build(first), build(first)
    model.blocks[2] = model.blocks[0]
    other.blocks[2].load_state_dict(other.blocks[0].state_dict())
    assert_unchanged(lambda: one_pass(model))
    with dinov2_attn.install():
        expected = other.get_self_attention(IMAGES)
        assert_close(model.get_self_attention(IMAGES), expected)
        output, attentions = model(IMAGES, return_attention=True)
        assert_close(output, other(IMAGES))
        assert_close(attentions, expected)
        with pytest.raises(IncompatibleUpstreamError, match="shared"), record(model):
            model(IMAGES)


def overriding(cls, forward):
    return type("Own", (cls,), {"forward": forward})


def test_a_subclass_that_calls_its_base(first):
    cls = first.cls("MemEffAttention")
    own = overriding(cls, lambda self, x, attn_bias=None: cls.forward(self, x, attn_bias) * 2)
    model = build(first)
    expected = [build(first)(IMAGES)]
    for block in model.blocks:
        block.attn.__class__ = own
    assert_unchanged(lambda: one_pass(model))
    assert not are_close(model(IMAGES), expected[0])
    with dinov2_attn.install():
        with pytest.raises(NotGraftedError, match=r"install\(model\)"):
            model.get_self_attention(IMAGES)
        weights = _recorded(model)(IMAGES)  # needs no graft of install's
    with dinov2_attn.install(model):
        assert_all_close(model.get_self_attention(IMAGES), weights)


def test_a_block_of_ones_own_that_calls_nothing(first):
    """Its attention is upstream's, asked by nobody but itself: told, never answered wrongly."""
    cls = first.cls("NestedTensorBlock")
    own = overriding(cls, lambda self, x: x + self.attn(self.norm1(x)))
    model = build(first)
    for block in model.blocks:
        block.__class__ = own
    assert_unchanged(lambda: one_pass(model))
    with dinov2_attn.install():
        expected = _recorded(model)(IMAGES)
        with pytest.raises(NotGraftedError, match=r"install\(model\)"):
            model.get_self_attention(IMAGES)
        features = model(IMAGES)
        output, attentions = model(IMAGES, return_attention=True)
        assert_same_bits(output, features)
        assert_all_close(attentions, expected)
    with dinov2_attn.install(model):
        features = model(IMAGES)
        assert_all_close(model.get_self_attention(IMAGES), expected)
        output, attentions = model(IMAGES, return_attention=True)
        assert_same_bits(output, features)
        assert_all_close(attentions, expected)


def _recorded(model):
    def run(images):
        with record(model) as maps:
            model(images)
        return maps.weights

    return run
