"""Gradients of a target by the attention weights: those of explicit attention and autograd."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.nn import functional as F

from dinov2_attn import AttentionMaps, edit, record
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from tests.support import dinov3, models_at_kernel, upstreams
from tests.support import eager as textbook
from tests.support.explicit import eager_gradients
from tests.support.recordings import IMAGES, N, assert_nothing_on, build
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet

DINOV3 = dinov3.COPIES[-1]


def target(output):
    """Different for each channel, and not linear."""
    factors = torch.arange(1, output.shape[-1] + 1, dtype=output.dtype) / output.shape[-1]
    return (output.tanh() * factors).sum()


def of_upstream(**options):
    return build(upstreams.FIRST, **options), IMAGES


def of_lightly(**options):
    """A copy of newer code, which calls the fused kernel."""
    return build(upstreams.LIGHTLY, **options), IMAGES


def of_dinov3(**_):
    return DINOV3.load().build().double(), dinov3.IMAGES.double()


def of_fork(**options):
    model = models_at_kernel.build(upstreams.FIRST, **options)
    return model.requires_grad_(), IMAGES


MODELS = {
    "upstream": of_upstream,
    "lightly": of_lightly,
    "dinov3": of_dinov3,
    "norms": of_fork,
    "bias": lambda: of_fork(bias=True),
    "causal": lambda: of_fork(causal=True),
}


def backward(model, images, *args, **options):
    """Return the recording of a pass and of the backward pass of its target."""
    with record(model, *args, gradients=True, **options) as maps:
        output = model(images)
    target(output).backward()
    return maps


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_explicit_attention(kind):
    model, images = MODELS[kind]()
    weights, expected = eager_gradients(lambda: model(images), target)
    maps = backward(model, images)
    assert len(expected) == len(maps.layers) == len(maps.gradients)
    assert_close(maps.gradients, expected)
    assert_close(maps.weights, weights)
    assert not any(tensor.requires_grad for tensor in (*maps.gradients, *maps.weights))
    assert_nothing_on(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"queries": "cls", "heads": "mean"}])
def test_features_and_parameter_gradients_keep_their_bits(kind, options):
    model, images = MODELS[kind]()
    other = copy.deepcopy(model)
    plain = other(images)
    target(plain).backward()
    with record(model, gradients=True, **options) as maps:
        output = model(images)
    assert_same_bits(output, plain)
    target(output).backward()
    assert len(maps.gradients) == len(maps.layers)
    theirs = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert len(theirs) > 10
    assert_same_bits({n: p.grad for n, p in model.named_parameters() if n in theirs}, theirs)


QUERIES = {"cls": [0], "patches": list(range(1, N)), "some": [3, 1, -1]}


@pytest.mark.parametrize("rows", QUERIES)
@pytest.mark.parametrize("layers", [None, 1, [0, 2]])
@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_chosen_layers_rows_and_head_means(models, rows, layers):
    model, images = models()
    chosen = {None: [0, 1, 2], 1: [2]}[layers] if not isinstance(layers, list) else layers
    _, expected = eager_gradients(lambda: model(images), target)
    queries = rows if rows != "some" else QUERIES[rows]
    for heads in (None, "mean"):
        maps = backward(model, images, layers, queries=queries, heads=heads)
        for layer, ours in zip(chosen, maps.gradients, strict=True):
            theirs = expected[layer][:, :, QUERIES[rows]]
            assert_close(ours, theirs if heads is None else theirs.mean(1))


def test_autograd_grad_fills_them_too_and_leaves_no_parameter_gradient():
    model, images = of_upstream()
    images = images.clone().requires_grad_()
    _, expected = eager_gradients(lambda: model(images), target)
    with record(model, gradients=True) as maps:
        output = model(images)
    torch.autograd.grad(target(output), images)
    assert_close(maps.gradients, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_has_gradients_from_its_images():
    model, images = of_upstream()
    _, expected = eager_gradients(lambda: model(images), target)
    model.requires_grad_(False)
    assert_close(backward(model, images.clone().requires_grad_()).gradients, expected)


def test_each_backward_pass_takes_the_place_of_the_one_before():
    model, images = of_fork()
    with record(model, gradients=True) as maps:
        output = model(images)
    for channel in (0, 1):
        output[:, channel].sum().backward(retain_graph=True)
        _, expected = eager_gradients(lambda: model(images), lambda out, c=channel: out[:, c].sum())
        assert_close(maps.gradients, expected)


def test_a_backward_pass_that_misses_layers_does_not_mix_with_the_one_before():
    model, images = of_upstream()
    inner = []
    hook = model.blocks[0].register_forward_hook(lambda _, __, out: inner.append(out))
    with record(model, gradients=True) as maps:
        output = model(images)
    hook.remove()
    target(output).backward(retain_graph=True)
    assert len(maps.gradients) == 3
    inner[0].sum().backward()
    with pytest.raises(NotRecordedError, match="1, 2"):
        maps.gradients  # noqa: B018


def test_several_passes_and_one_backward_pass():
    model, images = of_upstream()
    with record(model, gradients=True) as maps:
        outputs = [model(images), model(images * 2)]
    sum(map(target, outputs)).backward()
    for one, own in zip(maps, (images, images * 2), strict=True):
        _, expected = eager_gradients(lambda own=own: model(own), target)
        assert_close(one.gradients, expected)


def test_a_second_derivative_may_follow():
    model, images = of_upstream()
    images = images.clone().requires_grad_()
    with record(model, gradients=True) as maps:
        output = model(images)
    (gradient,) = torch.autograd.grad(target(output), images, create_graph=True)
    first = [one.clone() for one in maps.gradients]
    assert not any(one.requires_grad for one in maps.gradients)
    gradient.square().sum().backward()
    assert_close(first, eager_gradients(lambda: model(images), target)[1])


WRAPPED = {
    "blocks": lambda model: [(model.blocks, name) for name in list(model.blocks._modules)],
    "attention": lambda model: [(block, "attn") for block in model.blocks],
}


def checkpointed(where, impl):
    model, images = of_upstream()
    for parent, name in WRAPPED[where](model):
        inner = parent._modules[name]
        parent._modules[name] = checkpoint_wrapper(inner, checkpoint_impl=impl)
    return model, images.clone().requires_grad_()


@pytest.mark.parametrize("where", WRAPPED)
def test_checkpoints_change_nothing(where):
    model, images = checkpointed(where, CheckpointImpl.NO_REENTRANT)
    plain, _ = of_upstream()
    _, expected = eager_gradients(lambda: plain(images), target)
    maps = backward(model, images)
    assert_close(maps.gradients, expected)
    assert_nothing_on(model)


@pytest.mark.parametrize("where", WRAPPED)
def test_a_reentrant_checkpoint_is_named(where):
    model, images = checkpointed(where, CheckpointImpl.REENTRANT)
    with pytest.raises(NotRecordedError, match="use_reentrant=False"):
        backward(model, images)
    assert_nothing_on(model)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_is_an_error_that_leaves_nothing(grad):
    model, images = of_upstream()
    with pytest.raises(NotRecordedError, match="requires_grad_"), grad():
        backward(model, images)
    assert_nothing_on(model)
    assert len(backward(model, images).gradients) == 3


def test_a_frozen_pass_is_an_error():
    model, images = of_upstream()
    with pytest.raises(NotRecordedError, match="requires_grad_"):
        backward(model.requires_grad_(False), images)


def test_reading_too_early_is_an_error_and_so_is_reading_what_was_not_asked():
    model, images = of_upstream()
    with record(model, gradients=True) as maps:
        output = model(images)
        with pytest.raises(NotRecordedError, match="backward"):
            maps.gradients  # noqa: B018
    with record(model) as others:
        model(images)
    with pytest.raises(InvalidInputError, match="gradients=True"):
        others.gradients  # noqa: B018
    target(output).backward()
    assert len(maps.gradients) == 3


def test_transforms_of_functions_are_refused():
    model, images = of_upstream()
    with pytest.raises(NotRecordedError, match="torch.func"), record(model, gradients=True):
        torch.func.grad(lambda x: target(model(x)))(images)
    assert_nothing_on(model)


def test_dropout_in_the_kernel_is_refused():
    class Dropping(nn.Module):
        num_heads = 2

        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            drop = 0.5 if self.training else 0.0
            return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=drop).mean(1))

    model = nn.Sequential(Dropping())
    model[0].proj = nn.Linear(4, 8)
    tokens = noise(2, 5, 8, seed=0)
    with pytest.raises(InvalidInputError, match="eval"):
        backward(model.train(), tokens)
    assert len(backward(model.eval(), tokens).gradients) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_they_are_those_of_the_kernel(dtype):
    model, images = of_upstream()
    model, images = model.float(), images.float()
    try:
        with torch.autocast("cpu", dtype):
            model(images)
    except RuntimeError:
        pytest.skip("this torch has no such autocast; bfloat16 runs")
    with torch.autocast("cpu", dtype), record(model, gradients=True) as maps:
        output = model(images)
        target(output.float()).backward()

    def run():
        with torch.autocast("cpu", dtype):
            return model(images).float()

    _, expected = eager_gradients(run, target)
    for ours, theirs in zip(maps.gradients, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, within=0.1 * theirs.abs().max().item())


class Explicit(nn.Module):
    """Explicit code, with what projects put around the softmax."""

    num_heads = 2

    def __init__(self, way):
        super().__init__()
        self.qkv, self.proj, self.way = nn.Linear(8, 24), nn.Linear(8, 8), way
        self.seen = []

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.way == "batched":
            q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1) * 1
        # The very tensor, seen by a hook before anything is written into it.
        weights.register_hook(lambda grad: self.seen.append(grad.clone()))
        if self.way == "in place":
            weights = F.dropout(weights, 0.5, self.training, inplace=True)
        elif self.way == "dropout":
            weights = F.dropout(weights, 0.5, self.training)
        out = torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.way == "einsum" else weights @ v
        return self.proj(out.reshape(len(x), 2, *out.shape[-2:]).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ["plain", "batched", "einsum", "dropout", "in place"])
def test_explicit_code_gives_the_gradient_of_the_very_tensor(way, training):
    model = nn.Sequential(Explicit(way)).train(training)
    maps = backward(model, noise(2, 5, 8, seed=0))
    assert_same_bits(maps.gradients[0], model[0].seen[0].reshape(2, 2, 5, 5))


def test_kernels_whose_output_is_changed_in_place_or_cut():
    """The gradient is that of what the kernel returned, not of what became of it."""

    class Changing(Explicit):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            # A mask with a gradient: no fused kernel, which would need its output as it was.
            out = F.scaled_dot_product_attention(q, k, v, self.mask)
            out *= 2
            out[:, :, 1:] = out[:, :, 1:] + 1
            out = out.transpose(1, 2)
            out += 1
            return self.proj(out.flatten(2))

    model, tokens = nn.Sequential(Changing("")).double(), noise(2, 5, 8, seed=0).double()
    model[0].mask = nn.Parameter(noise(5, 5, seed=1).double())
    _, expected = eager_gradients(lambda: model(tokens), target)
    assert_close(backward(model, tokens).gradients, expected)


def test_a_list_of_dinov3_gives_gradients_of_each_batch():
    model, images = of_dinov3()
    crops = dinov3.CROPS.double()

    def total(outputs):
        return sum(target(one["x_norm_clstoken"]) for one in outputs)

    with record(model, gradients=True) as maps:
        outputs = model.forward_features([images, crops], [None, None])
    total(outputs).backward()
    _, expected = eager_gradients(
        lambda: model.forward_features([images, crops], [None] * 2), total
    )
    assert_close(maps[0].gradients, expected[0::2])
    assert_close(maps[1].gradients, expected[1::2])


@quiet
def test_a_nested_list_gives_gradients_of_each_batch(nested):
    attention = nested.cls("MemEffAttention")
    model = build(nested, block_fn=partial(nested.cls("NestedTensorBlock"), attn_class=attention))
    if nested is upstreams.MOGE:
        pytest.skip("its forward_features takes no lists; upstream's does")
    batches = [IMAGES, IMAGES[:1, :, :2, :4] * 2]

    def loss_of(features):
        return target(features["x_norm_clstoken"])

    with record(model, gradients=True) as maps:
        outputs = model.forward_features(batches, [None, None])
    sum(map(loss_of, outputs)).backward()
    assert len(maps) == 2
    for images, ours in zip(batches, maps, strict=True):
        with record(model, gradients=True) as alone:
            loss = loss_of(model.forward_features(images))
        loss.backward()
        assert_close(ours.gradients, alone.gradients)


def test_reduce_is_given_each_gradient():
    model, images = of_fork()
    _, expected = eager_gradients(lambda: model(images), target)
    maps = backward(model, images, reduce=lambda layer, weights: (layer, weights.sum(-1)))
    assert [layer for layer, _ in maps.gradients] == [0, 1, 2]
    assert_close([one for _, one in maps.gradients], [one.sum(-1) for one in expected])


def test_copies_and_files_hold_them(tmp_path):
    pytest.importorskip("safetensors")
    model, images = of_upstream()
    with record(model, gradients=True) as maps:
        output = model(images)
    early = maps.cpu()
    target(output).backward()
    assert_same_bits(early.gradients, maps.gradients)
    assert_same_bits(maps.numpy().gradients, [one.numpy() for one in maps.gradients])
    maps.save(tmp_path / "maps.safetensors")
    read = AttentionMaps.load(tmp_path / "maps.safetensors")
    assert_same_bits(read.gradients, maps.gradients)
    assert_same_bits(read.weights, maps.weights)


def textbook_gradients(model, images, change, *, explicit):
    """Return the changed weights of each call, and the gradients by them."""
    weights = []

    def keep(number, one):
        weights.append(change(number, one))
        return weights[-1]

    # Upstream's explicit code is replaced on the instances, calls of PyTorch's kernel by a mode.
    with textbook.eager_attention(model, keep) if explicit else textbook.Eager(keep):
        output = model(images)
    return weights, list(torch.autograd.grad(target(output), weights))


def without_key(_, weights):
    seen = weights * (torch.arange(weights.shape[-1]) != 3)
    return seen / seen.sum(-1, keepdim=True)


def without_head(number, weights):
    kept = torch.tensor([number != 1, True])[:, None, None]
    return weights * kept


EDITS = {
    "keys": (without_key, {"keys": [3]}),
    "heads": (without_head, {"heads": {1: [0]}}),
}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("models", [of_fork, of_upstream])
def test_of_an_edited_pass_they_are_those_by_the_edited_weights(models, kind):
    change, options = EDITS[kind]
    model, images = models()
    weights, expected = textbook_gradients(model, images, change, explicit=models is of_upstream)
    with edit(model, **options), record(model, gradients=True, facets="value") as maps:
        output = model(images)
    target(output).backward()
    assert_close(maps.weights, weights)
    assert_close(maps.gradients, expected)
    assert len(maps.facet("value")) == 3
    assert_nothing_on(model)
