"""Invariant 6 among other people's patches: below ours, on top, and taken off in any order."""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
from torch import nn

import dinov2_attn
from dinov2_attn.errors import IncompatibleUpstreamError, PatchedOnTopError, UpstreamDriftWarning
from tests.support import upstreams
from tests.support.dinov2_package import (
    ATTENTION,
    BLOCK,
    asks,
    classes,
    contents,
    is_grafted,
    load,
    passing_on,
    small_model,
    without_kernel,
)
from tests.support.strategies import noise

pytestmark = pytest.mark.usefixtures("first", "first_is_newest")


def test_what_somebody_patched_on_top_is_not_undone():
    block = upstreams.FIRST.cls("Block")
    before = contents(classes())
    dinov2_attn.install()
    ours = block.forward
    block.forward = theirs = lambda self, x: ours(self, x)
    with pytest.raises(PatchedOnTopError, match=r"(?s)Expected .*Block\.forward\.\nFound <func"):
        dinov2_attn.uninstall()
    assert block.forward is theirs
    assert is_grafted(upstreams.FIRST.cls("Attention"))  # nothing at all was undone
    assert dinov2_attn.status().covered == (f"{BLOCK}.Block.forward",)
    dinov2_attn.install()  # idempotent even so
    assert block.forward is theirs
    block.forward = ours
    dinov2_attn.uninstall()
    assert contents(classes()) == before


def test_what_somebody_patched_below_comes_back():
    load()  # a package is judged when all of it is there
    block = upstreams.FIRST.cls("Block")
    upstream = block.forward

    def theirs(self, x):
        return upstream(self, x)

    theirs.mark = "theirs"
    block.forward = theirs
    said = r"but for Block\.forward \(of tests\.grafting\.test_third_party_patches\)"
    try:
        with pytest.warns(UpstreamDriftWarning, match=said):
            handle = dinov2_attn.install()
        with handle:
            assert block.forward is not theirs
            assert not hasattr(block.forward, "mark")
            assert asks(load())
        assert block.forward is theirs
    finally:
        block.forward = upstream


def test_layers_alone_are_not_judged():
    """A package is when all of it is imported, so that one warning names all that changed."""
    with upstreams.FIRST.imported_anew():
        block = upstreams.FIRST.module(BLOCK).Block  # imports no model
        block.forward = passing_on_from_here(block.forward)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dinov2_attn.install():
                assert is_grafted(block)


def passing_on_from_here(upstream):
    def theirs(self, x):
        return upstream(self, x)

    return theirs


def test_what_somebody_has_undone_already_is_no_patch_on_top():
    """What was below our graft is there again, so nothing of ours is left to be undone."""
    block = upstreams.FIRST.cls("Block")
    upstream = block.forward
    before = contents(classes())

    def theirs(self, x):
        return upstream(self, x)

    block.forward = theirs
    with pytest.warns(UpstreamDriftWarning):
        dinov2_attn.install()
    block.forward = theirs  # put back what they remember
    assert dinov2_attn.status().covered == (f"{BLOCK}.Block.forward",)
    with pytest.warns(UpstreamDriftWarning):
        dinov2_attn.install()
    assert block.forward is not theirs  # grafted anew, not left bare
    assert asks(load())
    block.forward = theirs
    dinov2_attn.uninstall()
    assert block.forward is theirs
    block.forward = upstream
    assert contents(classes()) == before


@pytest.mark.parametrize("wrap", [functools.wraps, lambda function: lambda theirs: theirs])
def test_a_patch_below_may_be_taken_off_first(monkeypatch, wrap):
    """Their patch, our graft, their undo: pytest's monkeypatch ends in that order.

    Upstream's own function is back then, older than what our graft replaced.
    """
    load()  # a package is judged when all of it is there
    block = upstreams.FIRST.cls("Block")
    upstream = block.forward

    @wrap(upstream)
    def theirs(self, x):
        return upstream(self, x)

    monkeypatch.setattr(block, "forward", theirs)
    with pytest.warns(UpstreamDriftWarning):
        dinov2_attn.install()
    monkeypatch.undo()
    assert dinov2_attn.status().covered == (f"{BLOCK}.Block.forward",)
    assert "but for" not in dinov2_attn.status().recognised["dinov2"]
    dinov2_attn.install()  # not left bare
    assert asks(load())
    dinov2_attn.uninstall()
    assert block.forward is upstream


def test_a_patch_of_a_method_that_we_added_stays_through_another_installation():
    """Only what is set anew is looked at: the rest was found clean before it was patched."""
    model = load().DinoVisionTransformer
    dinov2_attn.install()
    ours, upstream = model.get_self_attention, model.forward.__wrapped__
    model.get_self_attention = theirs = passing_on(ours)
    model.forward = upstream
    dinov2_attn.install()
    assert model.get_self_attention is theirs
    assert model.forward is not upstream
    model.get_self_attention = ours


def test_what_somebody_has_undone_is_set_anew_for_all_who_need_it():
    """The package leaves, and a live model that shared its grafts goes on answering."""
    model, block = small_model(load()), upstreams.FIRST.cls("NestedTensorBlock")
    upstream = block.forward
    package, live = dinov2_attn.install(), dinov2_attn.install(model)
    block.forward = upstream
    dinov2_attn.install()
    package.uninstall()
    assert model.get_last_self_attention(noise(1, 3, 4, 4, seed=0)).shape[-1] == 5
    live.uninstall()
    assert block.forward is upstream


def test_a_class_that_is_left_out_takes_nothing_off():
    """The rest of the package goes on answering."""
    dinov2_attn.install()
    module = upstreams.FIRST.module(ATTENTION)
    module.Wrong = without_kernel(module.Attention)
    forward = module.Wrong.forward
    try:
        dinov2_attn.install()
        assert list(dinov2_attn.status().left_out) == [f"{ATTENTION}.Wrong"]
        assert module.Wrong.forward is forward
        assert is_grafted(module.Attention)
        assert asks(load())
    finally:
        del module.Wrong


@contextlib.contextmanager
def attention_replaced():
    """Attention classes without a kernel in the place of upstream's, as after a reload."""
    module = upstreams.FIRST.module(ATTENTION)
    before = {cls.__name__: cls for cls in upstreams.FIRST.attentions}
    for name in before:
        setattr(module, name, without_kernel(nn.Module))
    try:
        yield module
    finally:
        for name, cls in before.items():
            setattr(module, name, cls)


def test_a_failure_takes_off_what_was_grafted_before():
    """Half of a package that answers and half that does not would be worse than none."""
    dinov2_attn.install(ATTENTION)
    attention = upstreams.FIRST.cls("Attention")
    with attention_replaced():
        with pytest.raises(IncompatibleUpstreamError):
            dinov2_attn.install(ATTENTION)
        assert dinov2_attn.status().grafted == ()
        assert not is_grafted(attention)
        assert dinov2_attn.status().recognised[ATTENTION].startswith("refused: expected")


def test_a_failure_under_somebody_elses_patch_is_the_error_that_is_raised():
    """A reload brings code that is refused, while another graft cannot be undone."""
    dinov2_attn.install(ATTENTION)
    attention = upstreams.FIRST.cls("Attention")
    ours = attention.forward
    attention.forward = lambda self, x: ours(self, x)
    try:
        with attention_replaced() as module:
            with pytest.raises(IncompatibleUpstreamError):
                dinov2_attn.install(ATTENTION)
            assert not is_grafted(module.Attention)
    finally:
        attention.forward = ours
