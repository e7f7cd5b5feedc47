"""What is recognised of code in this process. ``test_eras`` covers whole histories."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
import types
import warnings
from pathlib import Path

import pytest

import dinov2_attn
from dinov2_attn.errors import UpstreamDriftWarning
from dinov2_attn.grafting.registry import GraftRegistry
from dinov2_attn.grafting.targets import LiveModel
from dinov2_attn.history import eras, identify
from tests.support import upstreams

FIRST = upstreams.FIRST

pytestmark = pytest.mark.usefixtures("first_is_newest")


def classes():
    """All that is recognised of upstream; its newest eras have a causal block too."""
    names = ["Attention", "MemEffAttention", "Block", "NestedTensorBlock"]
    if hasattr(FIRST.module(FIRST.block), "CausalAttentionBlock"):
        names.append("CausalAttentionBlock")
    return [FIRST.cls(name) for name in (*names, "BlockChunk", "DinoVisionTransformer")]


MODEL = LiveModel("a model", frozenset())


def warned(found, target="dinov2"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        identify.warn_of_drift(GraftRegistry().original, target, found)
    return [str(warning.message) for warning in caught if warning.category is UpstreamDriftWarning]


@pytest.fixture
def drifted(monkeypatch):
    """Upstream whose ``Attention.forward`` reads as another function of its own module does."""
    module = FIRST.module(FIRST.attention)
    other = module.Attention.__init__
    monkeypatch.setattr(module.Attention, "forward", other)
    return classes()


def test_code_that_is_known_is_not_warned_of(first):
    assert warned(classes()) == []


def test_what_changed_is_named_and_how_to_report_it(first, drifted):
    (said,) = warned(drifted)
    assert " but for Attention.forward. Weights" in said
    folder = Path(FIRST.module("dinov2").__file__).parent.parent
    assert said.endswith(f"dinov2-attn verify {shlex.quote(str(folder))} --update")


def test_a_package_is_judged_when_all_of_it_is_there(first, drifted):
    """Layers alone lack a model, of which a live model's classes need to hold no part."""
    layers = drifted[:-2]
    assert warned(layers) == []
    assert len(warned(layers, MODEL)) == 1


def test_forks_and_code_without_source_are_not_warned_of(first, drifted, monkeypatch):
    fork = [upstreams.ROMA.cls(name) for name in ("Attention", "MemEffAttention", "Block")]
    assert warned(fork, MODEL) == []
    hidden = types.FunctionType(eval("lambda self, x: x").__code__, drifted[0].__init__.__globals__)
    monkeypatch.setattr(FIRST.cls("MemEffAttention"), "forward", hidden)
    assert warned(drifted) == []


def test_a_package_of_upstreams_name_that_is_nearest_to_old_code_is_a_fork(drifted, monkeypatch):
    """What only the latest revisions have, a new one keeps; forks have what many have."""
    monkeypatch.undo()
    module = FIRST.module(FIRST.attention)
    monkeypatch.setattr(module.Attention, "forward", module.Attention.__init__)
    assert warned(classes()) == []
    newest = eras.table()[-1]
    parts = frozenset(i for i in newest.code if not i[0].startswith("DinoVisionTransformer."))
    assert eras.are_latest(eras.agreeing(parts))
    common = parts & eras.table()[-2].code
    assert not eras.are_latest(eras.agreeing(common))


def test_what_a_package_lacks_is_gone_and_a_live_model_may_lack_it(first):
    found = [cls for cls in classes() if cls.__name__ != "MemEffAttention"]
    (said,) = warned(found)
    assert " but for MemEffAttention.forward (gone). " in said
    assert warned(found, MODEL) == []


def test_a_function_that_is_gone_does_not_hide_those_after_it(first, monkeypatch):
    block = FIRST.module(FIRST.block)
    monkeypatch.delattr(block.NestedTensorBlock, "forward_nested")
    monkeypatch.setattr(block, "get_attn_bias_and_cat", block.Block.forward)
    said = identify.recognise(GraftRegistry().original, classes())
    assert "blocks as in " in said
    assert " but for get_attn_bias_and_cat, verified by contract" in said


def test_what_a_class_inherits_is_its_own(first):
    """A fork may put a class of upstream's name around upstream's."""
    *layers, base = classes()
    above = type(base.__name__, (base,), {"__module__": base.__module__})
    known = identify.recognise(GraftRegistry().original, [*layers, base])
    assert "models as in " in known
    assert identify.recognise(GraftRegistry().original, [*layers, above]) == known


def test_what_is_no_function_has_no_source_to_be_known_by(first, monkeypatch):
    monkeypatch.setattr(FIRST.cls("Attention"), "forward", len)
    said = identify.recognise(GraftRegistry().original, classes())
    assert said.startswith("attention verified by contract and behaviour, source not available; ")


def test_a_function_without_a_module_is_named(first, monkeypatch):
    def forward(self, x):
        return x

    monkeypatch.setattr(FIRST.cls("Attention"), "forward", types.FunctionType(forward.__code__, {}))
    said = identify.recognise(GraftRegistry().original, classes())
    assert " but for Attention.forward, verified by contract" in said


def test_of_what_may_be_gone_the_least_is_named():
    """Code that several eras share lacks what all of them have, not what a later one added."""
    later = {"CausalAttentionBlock.forward", "MemEffAttention.forward"}
    names = {name for era in eras.table() for name in era.digests} - later
    found = [identify.FunctionDigest(name, "any") for name in names]
    assert identify._missing(frozenset(), found) == ["MemEffAttention.forward (gone)"]


def test_all_that_differs_is_named(first, monkeypatch):
    Attention = FIRST.cls("Attention")
    init, forward = Attention.__init__, Attention.forward
    monkeypatch.setattr(Attention, "__init__", forward)
    monkeypatch.setattr(Attention, "forward", init)
    said = identify.recognise(GraftRegistry().original, classes())
    assert " but for Attention.__init__, Attention.forward, verified by contract" in said


def test_a_function_of_another_package_is_named_with_it(first, monkeypatch):
    def forward(self, x):
        return x

    monkeypatch.setattr(FIRST.cls("Attention"), "forward", forward)
    (said,) = warned(classes())
    assert f" but for Attention.forward (of {__name__}). " in said


@pytest.mark.parametrize("package", [None, types.ModuleType("dinov2")], ids=["gone", "bare"])
def test_an_unknown_folder_is_a_placeholder_in_the_report(first, drifted, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "dinov2", package)
    assert warned(drifted)[0].endswith(" verify PATH --update")


def test_the_function_below_a_graft_is_identified(first):
    """What is recognised is upstream's function, not ours, nor what an undone graft replaced."""
    Attention = FIRST.cls("Attention")
    plain, registry = Attention.forward, GraftRegistry()
    before = identify.recognise(registry.original, classes())

    @functools.wraps(plain, updated=())
    def ours(self, x):
        return x

    registry.set(Attention, "forward", ours, "dinov2")
    try:
        assert identify.recognise(registry.original, classes()) == before
    finally:
        Attention.forward = plain
    assert identify.recognise(registry.original, classes()) == before
    assert inspect.unwrap(Attention.forward) is plain
    assert dinov2_attn.status().recognised == {}
