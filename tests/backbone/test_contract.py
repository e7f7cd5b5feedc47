"""What a class must be for its grafts: the arguments it takes, and what its pass reads."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dinov2_attn.backbone.contract import (
    argument_names,
    check_arguments,
    check_methods,
    check_reads,
    keyword_of,
    options_of,
)
from dinov2_attn.backbone.structure import Role
from dinov2_attn.errors import IncompatibleUpstreamError


class Plain(nn.Module):
    def forward(self, x, attn_bias=None, *args, is_causal=False, **kwargs):
        return x


class Rotary(nn.Module):
    def forward(self, x, rope, mask=None):
        return x


class Answering(nn.Module):
    def forward(self, x, return_attn=False):
        return x

    def forward_features(self, x, return_attention=False):
        return x


def test_arguments_are_named_in_order_without_self_and_without_stars():
    assert argument_names(Plain.forward) == ["x", "attn_bias", "is_causal"]


def test_arguments_that_grafts_can_handle_are_accepted():
    check_arguments(Plain, Role.ATTENTION, "forward")
    check_arguments(Rotary, Role.TRANSFORMER, "forward")  # a model may take anything


@pytest.mark.parametrize("role", [Role.ATTENTION, Role.BLOCK, Role.CAUSAL_BLOCK])
def test_arguments_that_may_change_the_weights_are_named(role):
    words = f"{re.escape(f'{__name__}.Rotary.forward')} to take no more than .*\nFound the argument"
    with pytest.raises(IncompatibleUpstreamError, match=f"{words} rope, mask"):
        check_arguments(Rotary, role, "forward")


def test_what_a_block_may_take_is_not_what_attention_may():
    class Block(nn.Module):
        def forward(self, x_or_x_list):
            return x_or_x_list

    check_arguments(Block, Role.BLOCK, "forward")
    for role in (Role.ATTENTION, Role.CAUSAL_BLOCK):
        with pytest.raises(IncompatibleUpstreamError, match="x_or_x_list"):
            check_arguments(Block, role, "forward")


@pytest.mark.parametrize(
    ("role", "method"),
    [(Role.ATTENTION, "forward"), (Role.TRANSFORMER, "forward_features")],
)
def test_an_answer_of_its_own_stays(role, method):
    words = f"Found {method} with an argument {keyword_of(role)}"
    with pytest.raises(IncompatibleUpstreamError, match=words):
        check_arguments(Answering, role, method)


def test_methods_of_its_own_stay_and_ours_are_no_hindrance():
    def get_self_attention(self):
        return []

    class Model(nn.Module):
        pass

    ours = {"get_self_attention": get_self_attention, "get_last_self_attention": None}
    check_methods(Model, ours)
    Model.get_self_attention = get_self_attention
    check_methods(Model, ours)
    Model.get_last_self_attention = Model.forward
    with pytest.raises(IncompatibleUpstreamError, match="Found get_last_self_attention already"):
        check_methods(Model, ours)


class First(nn.Module):
    def __init__(self, dim, *, eps=0.0):
        super().__init__()


class Second(First):
    def __init__(self, heads, **options):
        super().__init__(**options)


class Third(Second):
    """It has the constructor of its base."""


class Fourth(Third):
    def __init__(self, depth, *args, **options):
        super().__init__(*args, **options)


class Closed(Fourth):
    def __init__(self, width):
        super().__init__(width)


@pytest.mark.parametrize(
    ("cls", "known"),
    [
        (First, {"dim", "eps"}),
        (Second, {"dim", "eps", "heads"}),
        (Third, {"dim", "eps", "heads"}),
        (Fourth, {"dim", "eps", "heads", "depth"}),
        (Closed, {"width"}),
    ],
)
def test_options_are_those_that_a_constructor_takes_or_hands_on(cls, known):
    every = {"dim", "eps", "heads", "depth", "width", "device"}
    assert options_of(cls) & every == known


class Attention(nn.Module):
    """It reads what upstream's does."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.attn_drop = nn.Linear(2, 6), nn.Linear(2, 2), nn.Dropout()
        self.num_heads, self.scale = 1, 1.0

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(self.num_heads * 3, -1)
        weights = (query @ key.mT * self.scale).softmax(-1)
        return self.proj(self.attn_drop(weights) @ value)


class Reading(Attention):
    """It reads more, in a helper."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.temperature = nn.Identity(), 3

    def helper(self):
        return self.q_norm, self.temperature

    def forward(self, x):
        self.helper()
        if self.training:
            raise ZeroDivisionError
        return super().forward(x)


def test_what_a_pass_reads_is_named_and_the_module_is_as_before():
    module, x = Reading().eval(), torch.ones(1, 2, 2)
    attributes = dict(vars(module))
    with pytest.raises(
        IncompatibleUpstreamError,
        match=r"(?s)Reading to compute .* also reads helper, q_norm, temperature\.",
    ):
        check_reads(module, lambda: module(x))
    assert type(module) is Reading
    assert vars(module) == attributes


def test_a_pass_that_fails_leaves_the_module_as_before():
    module = Reading().train()
    with pytest.raises(ZeroDivisionError):
        check_reads(module, lambda: module(torch.ones(1, 2, 2)))
    assert type(module) is Reading


def test_what_plain_attention_and_every_module_reads_is_no_reason():
    module, x = Attention(), torch.ones(1, 2, 2)

    def run():
        assert type(module).__name__ == "Attention"
        assert module.training
        return module(x)

    check_reads(module, run)
    assert type(module) is Attention
