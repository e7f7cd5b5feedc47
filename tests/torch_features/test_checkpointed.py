"""Activation checkpointing, by torch's wrappers and by hand: around blocks, chunks, attention."""

from __future__ import annotations

import pytest
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

import dinov2_attn
from dinov2_attn import record
from tests.support.bit_identity import assert_unchanged, one_pass
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.tolerances import assert_close

# torch's reentrant checkpointing warns of inputs without gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

WRAPS = {
    "blocks": lambda m, wrap: _wrap_children(m.blocks, wrap),
    "chunks": lambda m, wrap: _wrap_children(m.blocks, wrap),
    "attention": lambda m, wrap: [_wrap_child(b, "attn", wrap) for b in m.blocks],
}


def _wrap_children(parent, wrap):
    for name in list(parent._modules):
        _wrap_child(parent, name, wrap)


def _wrap_child(parent, name, wrap):
    parent._modules[name] = wrap(parent._modules[name])


def checkpointed(upstream, where, reentrant):
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    model = build(upstream, depth=4, block_chunks=2 if where == "chunks" else 0)
    WRAPS[where](model, lambda module: checkpoint_wrapper(module, checkpoint_impl=impl))
    return model


@pytest.mark.parametrize("where", WRAPS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_features_and_gradients_are_unchanged(first, where, reentrant):
    images = IMAGES.clone().requires_grad_()
    assert_unchanged(lambda: one_pass(checkpointed(first, where, reentrant), images))


@pytest.mark.parametrize("where", WRAPS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_every_way_to_ask_answers_as_without_checkpoints(first, where, reentrant):
    """Wrapped chunks too, as upstream's own training wraps them: indices stay those of blocks."""
    model = checkpointed(first, where, reentrant)
    with dinov2_attn.install():
        expected = build(first, depth=4).get_self_attention(IMAGES)
        assert_close(model.get_self_attention(IMAGES), expected)
        assert_close(model.get_self_attention(IMAGES, [1]), expected[1:2])
        assert_close(model(IMAGES, return_attention=True)[1], expected)
        with record(model) as maps:
            model(IMAGES)
        assert_all_close(maps.weights, expected)
        assert maps.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("where", WRAPS)
@pytest.mark.parametrize("way", ["asked", "recorded"])
def test_features_and_weights_of_a_pass_differentiate_together(first, where, way):
    """The second run of a block, in the backward pass, is not asked: it must not miss that."""

    def gradients(model):
        images = IMAGES.clone().requires_grad_()
        if way == "asked":
            output, weights = model(images, return_attention=True)
        else:
            with record(model) as maps:
                output = model(images)
            weights = maps.weights
        (output.square().sum() + sum(w.square().sum() for w in weights)).backward()
        return [images.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    with dinov2_attn.install():
        expected = gradients(build(first, depth=4))
        assert_all_close(gradients(checkpointed(first, where, reentrant=False)), expected)


@pytest.mark.parametrize("where", WRAPS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_weights_alone_differentiate(first, where, reentrant):
    def gradients(model):
        weights = model.get_last_self_attention(IMAGES.clone().requires_grad_())
        weights.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with dinov2_attn.install():
        expected = gradients(build(first, depth=4))
        assert_all_close(gradients(checkpointed(first, where, reentrant)), expected)
