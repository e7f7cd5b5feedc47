"""Attention, blocks and entrances of images are found by what a class is made of."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinov2_attn.backbone.backbone import Backbone, flat_blocks, transformers_in
from dinov2_attn.backbone.structure import (
    Role,
    attention_modules,
    classes_behind,
    classes_in,
    image_entrances,
    may_attend,
    names_a_kernel,
    role_of_class,
    role_of_module,
    running_attention,
    walk,
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(2, 6), nn.Linear(2, 2), 1

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Own(Attention):
    """It has its attributes from its base, and a pass of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Renamed(Own):
    """No code of its own."""


class Block(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(2), attention()

    def forward(self, x):
        return x + self.attn(self.norm1(x))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.attention, self.is_causal = nn.LayerNorm(2), Attention(), True

    def forward(self, x):
        return self.attention(self.attention_norm(x))


class Transformer(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.blocks = nn.ModuleList([Block(attention)])

    def prepare_tokens_with_masks(self, x):
        return x

    def forward(self, x):
        return self.blocks[0](self.prepare_tokens_with_masks(x))


ROLES = [
    (Attention, Role.ATTENTION),
    (Own, Role.ATTENTION),
    (Block, Role.BLOCK),
    (Causal, Role.CAUSAL_BLOCK),
    (Transformer, Role.TRANSFORMER),
]


@pytest.mark.parametrize(("cls", "role"), ROLES)
def test_a_role_is_that_of_the_class_and_of_its_modules(cls, role):
    assert role_of_class(cls) is role
    assert role_of_module(cls()) is role


def test_one_name_that_is_missing_is_another_class():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(2, 6), nn.Linear(2, 2)

    assert role_of_class(Partly) is role_of_module(Partly()) is None


def test_a_constructor_under_a_decorator_is_read_all_the_same():
    def noted(init):
        @functools.wraps(init)
        def wrapper(self, *args):
            init(self, *args)

        return wrapper

    class Decorated(nn.Module):
        @noted
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.num_heads = nn.Linear(2, 6), nn.Linear(2, 2), 1

    assert role_of_class(Decorated) is Role.ATTENTION


def test_a_constructor_without_code_of_python_says_nothing():
    class Builtin(nn.Module):
        __init__ = functools.partial(dict)

    assert role_of_class(Builtin) is None


def test_the_classes_of_a_module_are_those_of_its_package():
    class Stranger(Attention):
        def forward(self, x):
            return x

    class Derived(Stranger):
        """It runs the code of a class in another package."""

        def forward(self, x):
            return super().forward(x)

    class Helper:
        qkv = proj = num_heads = forward = None

    module = types.ModuleType(f"{__name__}.deeper")
    Stranger.__module__ = "another.package"
    vars(module).update(
        Stranger=Stranger, Derived=Derived, Helper=Helper, Linear=nn.Linear, Block=Block, number=3
    )
    assert list(dict(classes_in(module)).items()) == [
        (Attention, Role.ATTENTION),
        (Derived, Role.ATTENTION),
        (Block, Role.BLOCK),
    ]


def test_the_classes_behind_a_model_are_those_that_run_and_what_is_inside_comes_first():
    assert list(classes_behind(Transformer(Renamed))) == [
        (Attention, Role.ATTENTION),
        (Own, Role.ATTENTION),
        (Block, Role.BLOCK),
        (Transformer, Role.TRANSFORMER),
    ]
    assert list(classes_behind(nn.Sequential(Causal(), nn.Linear(2, 2)))) == [
        (Attention, Role.ATTENTION),
        (Causal, Role.CAUSAL_BLOCK),
    ]
    beside = nn.Sequential(Causal(), Transformer())
    assert Causal not in dict(classes_behind(beside))


def test_the_attention_that_runs_is_the_class_whose_forward_does():
    assert running_attention(Transformer(Renamed)) == {Own}
    assert running_attention(nn.Sequential(Transformer(Renamed), Attention())) == {Own, Attention}


def test_a_walk_goes_where_named_modules_goes_without_what_is_empty():
    model = nn.Sequential(Transformer(), nn.Linear(2, 2), nn.Sequential(Causal(), nn.Identity()))
    model.none = None
    model.register_module("nothing", None)
    model.again = model[0]
    expected = [(name, one) for name, one in model.named_modules() if [*one.children()]]
    assert list(walk(model)) == expected
    assert [name for name, _ in expected][:2] == ["", "0"]


def test_a_transformer_is_a_model_with_blocks_whose_tokens_are_prepared():
    model = Transformer()
    inside = nn.Sequential(nn.Linear(2, 2), nn.Sequential(model))
    other = nn.Module()
    other.blocks = nn.ModuleList([Block()])
    assert transformers_in(inside) == transformers_in(model) == [model]
    assert transformers_in(nn.Sequential(other, nn.Sequential(Block()))) == []


def test_blocks_are_in_order_whatever_chunks_and_wrappers_they_stand_in():
    first, second, third, fourth = (Block() for _ in range(4))
    chunk = nn.ModuleList([nn.Identity(), nn.Identity(), third])
    wrapped = nn.Sequential(fourth)
    blocks = [nn.ModuleList([first, second]), nn.Sequential(nn.Sequential(chunk)), wrapped]
    assert flat_blocks(blocks) == [first, second, third, wrapped]
    assert flat_blocks(nn.ModuleList([first, nn.Identity(), wrapped])) == [first, wrapped]


@pytest.mark.parametrize(("size", "grid"), [(2, (3, 4)), ((3, 4), (2, 2)), ((1, 8), (6, 1))])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 5, 3)])
def test_a_grid_is_that_of_the_last_two_dimensions(lead, size, grid):
    model = Transformer()
    model.patch_size, model.num_register_tokens = size, 4
    images = torch.zeros(*lead, 6, 8)
    assert Backbone(model).grid(images) == grid
    assert Backbone(model).length(images) == 1 + 4 + grid[0] * grid[1]


# What counts as attention


def scores(x):
    return x.softmax(-1)


def one_step_away(x):
    return scores(x)


def two_steps_away(x):
    return one_step_away(x)


def three_steps_away(x):
    return two_steps_away(x)


def softmax_elsewhere(x):
    return x.softmax(-1)


softmax_elsewhere.__module__ = "another.library"


def recursive(x):
    return recursive(x)


class With(nn.Module):
    """With a module inside, as all attention has."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


class ByMethod(With):
    def weights(self, x):
        return x.softmax(-1)


class ByModule(With):
    def build(self):
        return nn.Softmax(-1)


class ByXFormers(With):
    def forward(self, x):
        return memory_efficient_attention(x, x, x)  # noqa: F821


class ByFunction(With):
    def forward(self, x):
        return scores(x)


class ByFunctionsOfFunctions(With):
    def forward(self, x):
        return two_steps_away(x)


class ByInnerFunction(With):
    def forward(self, x):
        return [*(one.softmax(-1) for one in x)]


class ByStaticMethod(With):
    @staticmethod
    def weights(x):
        return x.softmax(-1)


class ByClassMethod(With):
    @classmethod
    def weights(cls, x):
        return x.softmax(-1)


class ByWrapped(With):
    @functools.wraps(scores)
    def weights(self, x):
        return x


class ByItsBase(ByMethod):
    pass


MADE = """
def helper(x):
    return x.softmax(-1)

def forward(self, x):
    return helper(x)
"""


class ByMadeCode(With):
    """Its code was made by ``exec``, and is of no module."""

    exec(MADE, made := {})
    forward = made["forward"]


NAMING = [
    Attention,
    ByMethod,
    ByModule,
    ByXFormers,
    ByFunction,
    ByFunctionsOfFunctions,
    ByInnerFunction,
    ByStaticMethod,
    ByClassMethod,
    ByWrapped,
    ByItsBase,
    ByMadeCode,
]


class FarAway(With):
    def forward(self, x):
        return three_steps_away(x)


class Elsewhere(With):
    """The function is another library's."""

    def forward(self, x):
        return softmax_elsewhere(x)


class OwnSoftmax(nn.Softmax):
    """No attention, but what attention may call: PyTorch's code in it is no reason."""

    def __init__(self):
        super().__init__(-1)
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return super().forward(self.inner(x))


class ByProperty(With):
    @property
    def weights(self):
        return self.inner.weight.softmax(-1)

    @functools.cached_property
    def kept(self):
        return self.inner.weight.softmax(-1)


class NoneAtAll(With):
    constant = 3

    def forward(self, x):
        return recursive(x)


@pytest.mark.parametrize("cls", NAMING)
def test_code_that_names_a_kernel_may_be_attention(cls):
    assert names_a_kernel(cls)
    assert names_a_kernel(cls)
    assert may_attend(cls())


NAMING_NONE = [FarAway, Elsewhere, OwnSoftmax, ByProperty, NoneAtAll, nn.MultiheadAttention]


@pytest.mark.parametrize("cls", NAMING_NONE)
def test_code_that_names_none_is_no_attention(cls):
    assert not names_a_kernel(cls)
    assert not may_attend(cls(2, 1) if cls is nn.MultiheadAttention else cls())


PROJECTIONS = [("to_q", "to_k", "to_v"), ("wq", "wk", "wv"), ("Wqkv",), ("qkv", "proj")]


@pytest.mark.parametrize("names", PROJECTIONS)
def test_projections_of_attention_make_it_attention_whatever_its_code_names(names):
    module = NoneAtAll()
    del module.inner
    for name in names:
        assert not may_attend(module)
        setattr(module, name, nn.Linear(2, 2))
    assert may_attend(module)


def test_a_module_without_any_inside_is_no_attention():
    class Alone(nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    assert not may_attend(Alone())


def test_only_the_innermost_of_those_that_name_a_kernel_is_attention():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.between = Attention(), nn.Sequential(nn.Identity(), Attention())
            self.last = Attention()

        def forward(self, x):
            return self.last(self.between(self.first(x))).softmax(-1)

    model = nn.Sequential(Outer(), Attention())
    found = attention_modules(model)
    assert list(found) == ["0.first", "0.between.1", "0.last", "1"]
    assert list(found.values()) == [model[0].first, model[0].between[1], model[0].last, model[1]]
    assert attention_modules(model[1]) == {"": model[1]}


# Where images come in


class Cut(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv


@pytest.mark.parametrize(
    ("conv", "cuts"),
    [
        (nn.Conv2d(3, 4, 2, 2), True),
        (nn.Conv2d(3, 4, (1, 2), (1, 2)), True),
        (nn.Conv3d(3, 4, 2, 2), True),
        (nn.Conv2d(3, 4, 1, 1), False),
        (nn.Conv2d(3, 4, 3, 2), False),
        (nn.Conv1d(3, 4, 2, 2), False),
        (nn.Linear(3, 4), False),
        (None, False),
    ],
)
def test_images_come_in_where_a_convolution_cuts_them(conv, cuts):
    inside = Cut(conv)
    model = nn.Sequential(nn.Sequential(nn.Identity(), inside), Attention())
    assert image_entrances(model) == ([inside] if cuts else [])


def test_a_container_of_pytorchs_own_is_no_entrance():
    assert image_entrances(nn.Sequential(nn.Conv2d(3, 4, 2, 2))) == []
