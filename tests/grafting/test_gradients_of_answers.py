"""``autograd.grad(output, attentions)`` of an asked pass: that of explicit attention."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

import dinov2_attn
from dinov2_attn import edit, record
from tests.maps.test_gradients import MODELS, of_dinov3, of_fork, of_upstream, target
from tests.support import eager as textbook
from tests.support.explicit import Eager, eager_gradients
from tests.support.recordings import assert_nothing_on
from tests.support.tolerances import assert_close, assert_same_bits


def ask(model, images, **options):
    """Return the output and the weights of each layer, from one pass."""
    with dinov2_attn.install(model):
        return model(images, return_attention=True, **options)


def of_parameters(model, loss, **options):
    """Return the gradients of ``loss`` by the parameters that have one, by name."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, **options)
    pairs = zip(named, found, strict=True)
    return {name: gradient for (name, _), gradient in pairs if gradient is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_they_are_those_of_explicit_attention(kind):
    model, images = MODELS[kind]()
    weights, expected = eager_gradients(lambda: model(images), target)
    output, attentions = ask(model, images)
    assert_close(attentions, weights)
    assert_close(torch.autograd.grad(target(output), attentions), expected)
    assert_nothing_on(model)


@pytest.mark.parametrize("kind", MODELS)
def test_output_and_parameter_gradients_keep_their_bits(kind):
    model, images = MODELS[kind]()
    other = copy.deepcopy(model)
    plain = other(images)
    output, _ = ask(model, images)
    assert_same_bits(output, plain)
    theirs = of_parameters(other, target(plain))
    assert len(theirs) > 10
    assert_same_bits(of_parameters(model, target(output), retain_graph=True), theirs)
    target(output).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_bits(grads, theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_a_loss_of_output_and_weights_is_that_of_explicit_attention(kind):
    model, images = MODELS[kind]()

    def loss(output, weights):
        return target(output) + sum((w * w.detach().sin()).sum() for w in weights)

    with Eager() as eager:
        expected = of_parameters(model, loss(model(images), eager.weights))
    assert_close(of_parameters(model, loss(*ask(model, images))), expected)


@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_the_weights_alone_have_the_gradients_of_before(models):
    model, images = models()
    with dinov2_attn.install(model):
        expected = of_parameters(model, model.get_last_self_attention(images)[..., 0].sum())
        _, attentions = model(images, return_attention=True)
    assert_close(of_parameters(model, attentions[-1][..., 0].sum()), expected)


@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_backward_passes_in_any_order_do_not_mix(models):
    model, images = models()
    _, by_weights = eager_gradients(lambda: model(images), target)
    by_parameters = of_parameters(model, target(model(images)))
    output, attentions = ask(model, images)
    for _ in range(2):
        only = torch.autograd.grad(target(output), attentions[1], retain_graph=True)
        assert_close(only[0], by_weights[1])
        assert_same_bits(of_parameters(model, target(output), retain_graph=True), by_parameters)
        together = torch.autograd.grad(
            target(output), [*attentions, model.blocks[0].norm1.weight], retain_graph=True
        )
        assert_close(together[:-1], by_weights)
        assert_same_bits(together[-1], by_parameters["blocks.0.norm1.weight"])


@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_a_second_derivative_is_that_of_explicit_attention(models):
    model, images = models()

    def second(output, weights):
        gradients = torch.autograd.grad(target(output), weights, create_graph=True)
        return of_parameters(model, sum((g * g).sum() for g in gradients))

    with Eager() as eager:
        expected = second(model(images), eager.weights)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_close(second(*ask(model, images)), expected)


@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_hooks_on_the_weights_do_as_on_explicit_attention(models):
    model, images = models()

    def halved(output, weights):
        weights[1].retain_grad()
        weights[1].register_hook(lambda gradient: gradient / 2)
        target(output).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return weights[1].grad, found

    with Eager() as eager:
        expected = halved(model(images), eager.weights)
    assert_close(halved(*ask(model, images)), expected)


@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_nothing_is_kept_when_a_backward_pass_is_over(models):
    model, images = models()
    output, attentions = ask(model, images)
    (gradient,) = torch.autograd.grad(target(output), attentions[0], retain_graph=True)
    seen = weakref.ref(gradient)
    del gradient
    gc.collect()
    assert seen() is None
    weights = weakref.ref(attentions[0])
    del output, attentions
    gc.collect()
    assert weights() is None


EDITED = {
    "keys": {"keys": [3]},
    "heads": {"heads": {1: [0]}},
    "weights": {"weights": lambda layer, weights: weights.roll(1, 1)},
}


@pytest.mark.parametrize("kind", EDITED)
def test_of_an_edited_pass_they_are_those_by_the_edited_weights(kind):
    model, images = of_fork()
    options = EDITED[kind]

    def change(number, weights):
        if kind == "weights":
            return weights.roll(1, 1)
        if kind == "heads":
            return weights * torch.tensor([number != 1, True])[:, None, None]
        seen = weights * (torch.arange(weights.shape[-1]) != 3)
        return seen / seen.sum(-1, keepdim=True)

    weights = []
    with textbook.Eager(lambda n, w: weights.append(change(n, w)) or weights[-1]):
        output = model(images)
    expected = torch.autograd.grad(target(output), weights)
    with edit(model, **options):
        output, attentions = ask(model, images)
    assert_close(attentions, weights)
    assert_close(torch.autograd.grad(target(output), attentions), expected)


def test_a_recording_around_an_asked_pass_has_its_gradients_too():
    model, images = of_fork()
    _, expected = eager_gradients(lambda: model(images), target)
    with record(model, gradients=True) as maps:
        model(images)
    with dinov2_attn.install(model), record(model, gradients=True) as maps:
        output = model.forward(images)
    target(output).backward()
    assert_close(maps.gradients, expected)


def wrapped(impl, where):
    model, images = of_fork()
    for block in model.blocks:
        if where == "attention":
            block.attn = checkpoint_wrapper(block.attn, checkpoint_impl=impl)
    if where == "blocks":
        for name, block in list(model.blocks.named_children()):
            model.blocks._modules[name] = checkpoint_wrapper(block, checkpoint_impl=impl)
    return model, images.clone().requires_grad_()


@pytest.mark.parametrize("where", ["blocks", "attention"])
def test_checkpoints_that_do_not_enter_the_graph_again(where):
    model, images = wrapped(CheckpointImpl.NO_REENTRANT, where)
    plain, _ = of_fork()
    _, expected = eager_gradients(lambda: plain(images), target)
    output, attentions = ask(model, images)
    assert_close(torch.autograd.grad(target(output), attentions, retain_graph=True), expected)
    theirs = of_parameters(plain, target(plain(images)))
    ours = of_parameters(model, target(output))
    assert_same_bits(list(ours.values()), list(theirs.values()))


def test_reentrant_checkpoints_make_weights_without_a_graph():
    model, images = wrapped(CheckpointImpl.REENTRANT, "blocks")
    output, attentions = ask(model, images)
    assert not any(one.requires_grad for one in attentions)
    target(output).backward()
    assert model.patch_embed.proj.weight.grad is not None


@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_under_autocast(models):
    model, images = models()
    model, images = model.float(), images.float()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(images).float()

    _, expected = eager_gradients(run, target)
    plain = of_parameters(model, target(run()))
    with torch.autocast("cpu", torch.bfloat16):
        output, attentions = ask(model, images)
    found = torch.autograd.grad(target(output.float()), attentions, retain_graph=True)
    for ours, theirs, weights in zip(found, expected, attentions, strict=True):
        assert ours.dtype == weights.dtype
        assert_close(ours.to(theirs), theirs, within=0.1 * theirs.abs().max().item())
    assert_same_bits(of_parameters(model, target(output.float())), plain)


def test_a_dict_of_features_leads_to_the_weights_too():
    model, images = of_dinov3()
    _, expected = eager_gradients(lambda: model(images), target)
    with dinov2_attn.install(model):
        found = model.forward_features(images, return_attention=True)
    total = target(model.head(found["x_norm_clstoken"]))
    assert_close(torch.autograd.grad(total, found["attentions"]), expected)


@pytest.mark.parametrize("options", [{"queries": "cls"}, {"heads": "mean"}])
def test_rows_alone_and_head_means_are_no_part_of_the_output(options):
    """The docs name ``record(model, gradients=True)``, which gives theirs."""
    model, images = of_fork()
    output, attentions = ask(model, images, **options)
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(target(output), attentions)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_a_graph_nothing_is_added(grad):
    model, images = of_fork()
    model.requires_grad_(False)
    with grad():
        output, attentions = ask(model, images)
    assert output.grad_fn is None
    assert not any(one.requires_grad for one in attentions)


def test_of_a_pass_from_its_weights_they_are_those_of_explicit_attention():
    model, images = of_fork()
    _, expected = eager_gradients(lambda: model(images), target)
    with record(model, features="from_weights"):
        output, attentions = ask(model, images)
    assert_close(torch.autograd.grad(target(output), attentions), expected)
