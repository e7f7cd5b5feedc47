"""Which kernel a class's own ``forward`` calls, and on what flags that depends."""

from __future__ import annotations

import sys
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinov2_attn.backbone.proof import measure_kernel, sandbox
from dinov2_attn.errors import InvalidInputError, NoOperatorError
from dinov2_attn.kernels.branches import branches
from dinov2_attn.kernels.xformers import (
    FLAG,
    KERNEL,
    Kernel,
    check_stochastic_depth,
    describe_flags,
    flag_of,
    kernel_homes,
    kernel_namespace,
    runs_nested,
)
from tests.support import upstreams
from tests.support.strategies import noise
from tests.support.tolerances import assert_close

PINNED = upstreams.DEPTH_ANYTHING  # what a checkout brings is of other eras
FUSED = 4**-0.5


@pytest.fixture
def memory_efficient(first):
    """Upstream's class that asks the flag, below any graft."""
    return PINNED.cls("MemEffAttention")


def flip(monkeypatch, module, value):
    monkeypatch.setattr(PINNED.module(module), FLAG, value)


def scales(cls):
    """The factor on scores of a module whose ``scale`` is 3: plain, with xFormers, as it is."""
    module = cls(8, num_heads=2)
    module.scale = torch.tensor(3.0)  # whatever can be made a number of
    with sandbox():
        kernel = measure_kernel(cls, cls.forward)
    found = [kernel.scale(module, 4, xformers=flag) for flag in (False, True, None)]
    assert all(type(scale) is float for scale in found)
    return found


def test_the_scale_is_that_of_the_kernel_that_runs(memory_efficient, monkeypatch):
    assert scales(PINNED.cls("Attention")) == [3, 3, 3]
    assert scales(upstreams.ANOMALIB.cls("Attention")) == [FUSED] * 3
    assert scales(memory_efficient) == [3, FUSED, 3]
    flip(monkeypatch, PINNED.attention, True)
    assert scales(memory_efficient) == [3, FUSED, FUSED]


class Mask:
    """A bias of a class that no upstream here knows, as xFormers' are."""

    def materialize(self, *_, **__):
        raise NotImplementedError


def test_a_bias_is_taken_where_the_kernel_that_runs_takes_it(memory_efficient, monkeypatch):
    gated = Kernel(memory_efficient.forward, {})
    dense = Kernel(upstreams.MOGE.cls("Attention").forward, {})
    bias = torch.zeros(2, 2)
    for kernel in (gated, dense):
        with pytest.raises(
            InvalidInputError, match=r"(?s)to be None, a dense tensor.*builtins\.str"
        ):
            kernel.check_bias("causal")
    with pytest.raises(
        InvalidInputError, match=rf"(?s)no attn_bias.*{PINNED.attention}.{FLAG} is False"
    ):
        gated.check_bias(bias)
    dense.check_bias(bias)
    with pytest.raises(InvalidInputError, match="(?s)as a dense tensor.*one of type Mask"):
        dense.check_bias(Mask())
    flip(monkeypatch, PINNED.attention, True)
    gated.check_bias(bias)
    gated.check_bias(Mask())


def test_code_that_knows_no_flag_has_one_branch():
    forward = PINNED.cls("Attention").forward
    assert branches(forward) == {False: forward, True: forward}


@pytest.mark.parametrize("upstream", [PINNED, upstreams.FIRST], ids=str)
@pytest.mark.parametrize("flag", [True, False])
def test_both_branches_run_whatever_the_flag_says(first, monkeypatch, upstream, flag):
    """On a CPU, in float64, without xFormers: upstream's globals stay as they are.

    The first commit names xFormers' operators besides, where it is given a bias.
    """
    scope, memory_efficient = upstream.module(upstream.attention), upstream.cls("MemEffAttention")
    monkeypatch.setattr(scope, FLAG, flag)
    before = dict(vars(scope))
    module, tokens = memory_efficient(8, num_heads=2).double(), noise(2, 5, 8, seed=0).double()
    plain, memory = (branches(memory_efficient.forward)[key] for key in (False, True))
    assert_close(memory(module, tokens), plain(module, tokens))
    bias = noise(2, 2, 5, 5, seed=1).double()
    query, key, value = module.qkv(tokens).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    expected = module.proj(seen.transpose(1, 2).flatten(2))
    assert_close(memory(module, tokens, attn_bias=bias), expected)
    with pytest.raises(AssertionError, match="xFormers is required"):  # upstream's own
        plain(module, tokens, attn_bias=bias)
    assert dict(vars(scope)) == before


def test_a_branch_keeps_name_and_defaults(memory_efficient, monkeypatch):
    def forward(self, x, y=2, *, z=3):
        return XFORMERS_AVAILABLE, x, y, z  # noqa: F821  # of the globals below

    scope = {"__name__": "elsewhere", FLAG: "as found"}
    gated = types.FunctionType(forward.__code__, scope, "forward", (2,))
    gated.__kwdefaults__ = {"z": 3}
    found = branches(gated)
    assert [run(None, 1) for run in found.values()] == [(False, 1, 2, 3), (True, 1, 2, 3)]
    assert {run.__name__ for run in found.values()} == {"forward"}
    assert scope[FLAG] == "as found"


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_branch_with_xformers_computes_what_xformers_documents(scale):
    """Newer copies pass a scale and a probability of dropout, which evaluation makes 0."""

    def forward(q, k, v):
        if XFORMERS_AVAILABLE:  # noqa: F821
            return memory_efficient_attention(q, k, v, p=0.0, scale=scale)  # noqa: F821
        return None

    scope = {FLAG: False, KERNEL: None}
    gated = types.FunctionType(forward.__code__, scope, closure=forward.__closure__)
    query, key, value = (noise(2, 5, 2, 4, seed=seed).double() for seed in range(3))
    factor = FUSED if scale is None else scale
    rows = (query * (factor / FUSED), key, value)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in rows))
    found = branches(gated)[True](query, key, value)
    assert_close(found, expected.transpose(1, 2))


def test_a_flag_counts_where_it_is_asked(memory_efficient, monkeypatch):
    asks, asks_not = memory_efficient.forward, PINNED.cls("Attention").forward
    assert (flag_of(asks), flag_of(asks_not)) == (False, False)
    flip(monkeypatch, PINNED.attention, "yes")
    assert (flag_of(asks), flag_of(asks_not)) == (True, False)
    assert flag_of(partial(asks)) is False  # no function: nothing is known of it
    monkeypatch.delattr(PINNED.module(PINNED.attention), FLAG)
    assert flag_of(asks) is False


def test_flags_are_told_module_by_module(memory_efficient, monkeypatch):
    PINNED.module(PINNED.block)
    flip(monkeypatch, PINNED.attention, True)
    flip(monkeypatch, PINNED.block, False)
    layers = PINNED.block.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, f"{layers}.gone", None)
    monkeypatch.setitem(sys.modules, f"{layers}.plain", types.ModuleType("plain"))
    beside = types.ModuleType("beside")
    setattr(beside, FLAG, True)
    monkeypatch.setitem(sys.modules, f"{layers}beside", beside)
    flags = [f"{PINNED.attention}.{FLAG} is True", f"{PINNED.block}.{FLAG} is False"]
    forward = memory_efficient.forward
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    *said, environment = describe_flags(forward).split(", ")
    assert environment == "XFORMERS_DISABLED is not set"
    assert said[:2] == flags  # and what else of its own package has one
    assert said == sorted(said)
    assert all(line.startswith(f"{layers}.") for line in said)
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    assert describe_flags(forward).endswith(", XFORMERS_DISABLED is set")


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("block", [True, False])
def test_a_block_nests_where_both_flags_are_up(memory_efficient, monkeypatch, attention, block):
    flip(monkeypatch, PINNED.attention, attention)
    flip(monkeypatch, PINNED.block, block)

    class Own(PINNED.cls("NestedTensorBlock")):
        """Does its own thing first, and calls upstream's."""

        def forward(self, x):
            return super().forward(x)

    for cls in (PINNED.cls("NestedTensorBlock"), Own):
        assert runs_nested(cls(8, num_heads=2, attn_class=memory_efficient)) is (
            attention and block
        )


def test_what_asks_no_flag_does_not_nest(memory_efficient, monkeypatch):
    flip(monkeypatch, PINNED.attention, True)
    flip(monkeypatch, PINNED.block, True)
    nested = PINNED.cls("NestedTensorBlock")
    assert not runs_nested(nested(8, num_heads=2))  # its attention is the plain one
    assert not runs_nested(PINNED.cls("Block")(8, num_heads=2, attn_class=memory_efficient))
    without = nested(8, num_heads=2, attn_class=memory_efficient)
    del without.attn
    assert runs_nested(without) is False
    without.attn = nn.Module()
    assert runs_nested(without) is False


def test_the_kernel_is_at_home_where_a_forward_calls_it(memory_efficient, monkeypatch):
    module = PINNED.module(PINNED.attention)
    forward = memory_efficient.forward
    assert kernel_namespace(forward) is None  # without xFormers there is none
    monkeypatch.setattr(module, KERNEL, print, raising=False)
    assert kernel_namespace(forward) is vars(module)
    assert kernel_namespace(PINNED.cls("Attention").forward) is None
    assert kernel_namespace(PINNED.cls("NestedTensorBlock").forward) is None  # asks, does not call
    monkeypatch.delattr(module, FLAG)  # a class that does not ask
    assert kernel_namespace(forward) is vars(module)
    ops = types.ModuleType("xformers.ops")
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.delattr(module, KERNEL)
    assert kernel_namespace(forward) is vars(ops)  # as `xops.memory_efficient_attention`
    monkeypatch.delitem(sys.modules, "xformers.ops")
    assert kernel_namespace(forward) is None
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(module, FLAG, False, raising=False)
    assert kernel_namespace(forward) is None  # it asks, and its import found nothing


def test_every_module_that_holds_the_kernel_is_a_home_of_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    first, second, other = (types.ModuleType(name) for name in ("one", "two", "three"))
    setattr(first, KERNEL, print)
    setattr(second, KERNEL, print)
    setattr(other, KERNEL, "not callable")
    monkeypatch.setitem(sys.modules, "tests.one", first)
    assert kernel_homes() == []  # nobody has imported xFormers
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    assert [home for home in kernel_homes() if home is vars(first)] == [vars(first)]
    monkeypatch.setitem(sys.modules, "tests.two", second)
    monkeypatch.setitem(sys.modules, "tests.three", other)
    homes = kernel_homes()
    assert [any(home is vars(one) for home in homes) for one in (first, second, other)] == [
        True,
        True,
        False,
    ]


def test_stochastic_depth_of_a_list_is_for_cuda(memory_efficient, monkeypatch):
    """No tensor is needed: only the devices count."""
    flip(monkeypatch, PINNED.attention, True)
    flip(monkeypatch, PINNED.block, True)

    def on(*devices):
        return [types.SimpleNamespace(device=torch.device(device)) for device in devices]

    nested = PINNED.cls("NestedTensorBlock")
    block = nested(8, num_heads=2, attn_class=memory_efficient, drop_path=0.3).train()
    check_stochastic_depth(block, on("cuda", "cuda"))
    for devices in (("cpu",), ("cuda", "cpu")):
        with pytest.raises(NoOperatorError, match="with a drop path of 0.3"):
            check_stochastic_depth(block, on(*devices))
    block.eval()
    check_stochastic_depth(block, on("cpu"))
    without = nested(8, num_heads=2, attn_class=memory_efficient).train()
    check_stochastic_depth(without, on("cpu"))
    check_stochastic_depth(nn.Module().train(), on("cpu"))  # a block that knows of no such thing
