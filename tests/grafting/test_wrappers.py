"""Weights come from the grafts themselves, whatever stands between them and the question."""

from __future__ import annotations

import functools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinov2_attn.errors import NotGraftedError
from dinov2_attn.grafting.channel import ACTIVE, STATE
from dinov2_attn.grafting.models import is_grafted
from dinov2_attn.grafting.modules import ASKED
from tests.support import reference
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits

IMAGES = noise(2, 3, 4, 6, seed=0, dtype=torch.float64)


def build(upstream, **options):
    model = upstream.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=8, depth=3, num_heads=2, block_chunks=0, **options
    )
    return randomise(model.double(), 1)


class Wrapper(nn.Module):
    def __init__(self, inner, change=lambda out: out, hand_on=True):
        super().__init__()
        self.inner, self.change, self.hand_on = inner, change, hand_on

    def forward(self, *args, **kwargs):
        return self.change(self.inner(*args, **(kwargs if self.hand_on else {})))


class ByName(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens):
        return self.inner(x_or_x_list=tokens)


def test_wrappers_of_blocks_pass_the_question_on(models):
    """Sharded, compiled and checkpointed blocks are wrappers around grafted ones."""
    model = build(models)
    expected = model(IMAGES, return_attention=True)
    model.blocks[1] = Wrapper(model.blocks[1])
    output, attentions = model(IMAGES, return_attention=True)
    assert_same_bits(output, expected[0])
    assert_close(attentions, expected[1])
    assert_close(model.get_self_attention(IMAGES), expected[1])


def test_a_wrapped_block_that_drops_samples_in_training_answers_for_all(models):
    """Its ratio is an attribute that the wrapper does not hand on."""
    model = build(models, drop_path_rate=0.5, drop_path_uniform=True).train()
    images = IMAGES.repeat(4, 1, 1, 1)
    torch.manual_seed(5)
    output, expected = model(images, return_attention=True)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = Wrapper(block)
    torch.manual_seed(5)
    again, attentions = model(images, return_attention=True)
    assert_same_bits(again, output)
    assert_close(attentions, expected)
    for some in (images, images[:1]):
        shapes = [weights.shape for weights in model.get_self_attention(some)]
        assert shapes == [weights[: len(some)].shape for weights in expected]
        shapes = [weights.shape for weights in model(some, return_attention=True)[1]]
        assert shapes == [weights[: len(some)].shape for weights in expected]


def test_transforms_of_functions_differentiate_weights(models):
    model = build(models)

    def of_asked(images):
        return sum(weights.square().sum() for weights in model.get_self_attention(images))

    def of_pass(images):
        output, attentions = model(images, return_attention=True)
        return sum(weights.square().sum() for weights in attentions) + output.sum()

    for function in (of_asked, of_pass):
        images = IMAGES.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(images), images)
        assert_close(torch.func.grad(function)(IMAGES), expected)


def test_a_model_that_install_reached_is_known_through_what_wraps_its_method(models):
    """FSDP wraps the method of an instance, and a subclass may have one of its own."""
    model = build(models)
    own = type("Own", (type(model),), {"get_self_attention": lambda self, x: x})
    shell, stranger = SimpleNamespace(), SimpleNamespace(get_self_attention=lambda x: x)
    shell.get_self_attention = functools.wraps(model.get_self_attention)(lambda *_: None)
    assert is_grafted(model)
    assert is_grafted(own.__new__(own))
    assert is_grafted(shell)
    assert not is_grafted(stranger)
    assert not is_grafted(nn.Linear(2, 2))


@pytest.mark.parametrize("training", [False, True])
def test_no_projection_runs_twice_where_its_kernel_tells_the_weights(models, training):
    model, ran = build(models).train(training), []
    for i, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(lambda *_, i=i: ran.append(i))
    for layers in (2, 3, [0, 2]):
        ran.clear()
        model.get_self_attention(IMAGES, layers)
        assert ran == [0, 1, 2]
    ran.clear()
    model(IMAGES, return_attention=True)
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("where", ["block", "attn"])
def test_a_wrapper_that_drops_the_question_is_told(models, where):
    """It would give features in place of weights: (B, N, C), with no error (UPSTREAM trap 2)."""
    model = build(models)
    if where == "block":
        model.blocks[1] = Wrapper(model.blocks[1], hand_on=False)
    else:
        model.blocks[1].attn = Wrapper(model.blocks[1].attn, hand_on=False)
    with pytest.raises(NotGraftedError, match=r"(?s)called without it.*\*\*kwargs"):
        model.get_self_attention(IMAGES, [1])


@pytest.mark.parametrize("where", ["block", "attn"])
def test_an_adapter_around_it_does_not_touch_the_weights(models, where):
    model = build(models)
    block = model.blocks[2]
    expected = model.get_last_self_attention(IMAGES)
    if where == "block":
        model.blocks[2] = Wrapper(block, change=lambda out: out * 2)
    else:
        block.attn = Wrapper(block.attn, change=lambda out: out * 2)
    assert_close(model.get_last_self_attention(IMAGES), expected)


@pytest.mark.parametrize("where", ["block", "attn"])
def test_hooks_that_change_features_do_not_touch_the_weights(models, where):
    """Ablation and steering hooks: the attention is that of the pass they make."""
    model = build(models)
    module = model.blocks[1] if where == "block" else model.blocks[1].attn
    module.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    inputs = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0])))
    model(IMAGES)
    expected = [reference.weights(m, x) for m, x in inputs]
    for answers in (model.get_self_attention(IMAGES), model(IMAGES, return_attention=True)[1]):
        for answer, weights in zip(answers, expected, strict=True):
            assert_close(answer, weights)


def test_a_projection_that_draws_is_drawn_once(models):
    """LoRA's dropout in training: features as unasked, weights of the same draw."""
    model = build(models).train()
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda m, _, out: F.dropout(out, 0.5, m.training))
    kernel_inputs = []
    torch.manual_seed(3)
    plain = model(IMAGES)
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _, __, out: kernel_inputs.append(out))
    torch.manual_seed(3)
    asked, attentions = model(IMAGES, return_attention=True)
    assert_same_bits(plain, asked)
    assert len(kernel_inputs) == len(attentions) == 3
    for block, projected, weights in zip(model.blocks, kernel_inputs, attentions, strict=True):
        heads = block.attn.num_heads
        given = SimpleNamespace(num_heads=heads, qkv=lambda _, projected=projected: projected)
        tokens = projected[..., : projected.shape[-1] // 3]
        assert_close(weights, reference.weights(given, tokens))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_batch_of_nothing_is_answered_in_training(models, rate):
    model = build(models, drop_path_rate=rate).train()
    _, attentions = model(IMAGES[:0], return_attention=True)
    assert [weights.shape for weights in attentions] == [(0, 2, 7, 7)] * 3


def test_blocks_may_be_given_their_tokens_by_name_in_training(models):
    """As somebody's own loop over them may; upstream's own names nothing."""
    model = build(models).train()
    _, expected = model(IMAGES, return_attention=True)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = ByName(block)
    _, attentions = model(IMAGES, return_attention=True)
    assert_close(attentions, expected)


def test_gradients_flow_through_blocks_and_models(models):
    model = build(models)
    for parameter in model.parameters():
        parameter.requires_grad_()  # RoMa freezes its copy
    model.get_last_self_attention(IMAGES, queries="cls")[..., 1].sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.blocks[2].norm1.weight.grad.abs().sum() > 0
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    model(IMAGES, return_attention=True)[1][1].square().sum().backward()
    assert model.blocks[1].norm1.weight.grad.abs().sum() > 0
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_the_words_reach_every_call(models):
    options = {"num_register_tokens": 3} if models.has_registers else {}
    model = build(models, **options)
    for word in ("cls", "registers", "patches"):
        expected = model.get_self_attention(IMAGES, queries=word, heads="mean")
        _, attentions = model(IMAGES, return_attention=True, queries=word, heads="mean")
        features = model.forward_features(IMAGES, return_attention=True, queries=word, heads="mean")
        for a, b, c in zip(expected, attentions, features["attentions"], strict=True):
            assert_close(a, b)
            assert_close(a, c)


def test_a_block_selects_from_every_tensor_of_a_list(models):
    block = models.cls("NestedTensorBlock")(8, num_heads=2)
    tokens = [noise(1, 5, 8, seed=0), noise(2, 3, 8, seed=1)]
    answer = block(tokens, return_attention=True, queries=[1], heads="mean")
    assert [w.shape for w in answer] == [(1, 1, 5), (2, 1, 3)]


def test_one_thread_asking_does_not_disturb_another(models):
    model = build(models)
    expected, caught, failures = model.get_self_attention(IMAGES), [], []

    def ask():
        try:
            for _ in range(10):
                caught.append(model(IMAGES, return_attention=True)[1])
                caught.append(model.get_self_attention(IMAGES))
        except Exception as error:  # reported below, out of the thread
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(caught) == 80
    for got in caught:
        assert_close(got, expected)


def test_asking_inside_of_asking(models):
    """A hook in the middle of a pass may ask another model for its attention."""
    inner, outer, caught = build(models), build(models), []
    expected = inner.get_self_attention(IMAGES), outer.get_self_attention(IMAGES)

    def ask_inner(*_):
        caught.append(inner(IMAGES, return_attention=True)[1])

    outer.blocks[0].mlp.register_forward_hook(ask_inner)
    _, attentions = outer(IMAGES, return_attention=True)
    assert_close(caught[0], expected[0])
    assert len(attentions) == 3
    assert_close(attentions, expected[1])


def test_what_is_not_asked_keeps_nothing(models):
    """No weights stay behind in the thread that asked for them."""
    module = models.attentions[1](8, num_heads=2)
    module(noise(1, 5, 8, seed=0), return_attn=True)
    assert STATE.receivers == ()
    assert ASKED.published is None
    assert ASKED.listener is None


def test_a_switch_is_on_while_anybody_holds_it():
    switch = type(ACTIVE)()
    assert not switch.on
    assert not switch.edits
    with switch.active():
        with switch.active():
            assert switch.on
        assert switch.on
    assert not switch.on


def test_no_layer_is_an_empty_answer_for_which_no_block_runs(models):
    model, ran = build(models), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: ran.append(1))
        block.attn.register_forward_pre_hook(lambda *_: ran.append(1))
    assert model.get_self_attention(IMAGES, []) == ()
    assert model.get_self_attention([IMAGES, IMAGES], []) == ()
    assert not ran


@pytest.mark.parametrize("layers", [[0], [1], [0, 1], [0, 2], [2, 0], 1, 2, None])
def test_some_layers_are_those_of_all_and_later_blocks_do_not_run(models, layers):
    model, ran = build(models), []
    every = model.get_self_attention(IMAGES)
    wanted = range(3)[-layers:] if isinstance(layers, int) else sorted(layers or range(3))
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    assert_close(list(model.get_self_attention(IMAGES, layers)), [every[i] for i in wanted])
    assert ran == list(range(max(wanted)))
    found = model.get_self_attention([IMAGES, IMAGES[:1]], layers, queries="cls")
    expected = [[every[i][:, :, :1], every[i][:1, :, :1]] for i in wanted]
    assert_close([list(weights) for weights in found], expected)
