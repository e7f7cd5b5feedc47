"""install, uninstall, status and failure, one idea at a time; their orders are in test_events."""

from __future__ import annotations

import re
import sys

import pytest

import dinov2_attn
from dinov2_attn.errors import IncompatibleUpstreamError
from dinov2_attn.grafting.registry import Graft, GraftRegistry
from dinov2_attn.grafting.targets import UPSTREAM_MODULES
from tests.support import upstreams
from tests.support.dinov2_package import (
    BLOCK,
    MODEL,
    asks,
    classes,
    contents,
    is_grafted,
    load,
    reload,
    small_model,
)
from tests.support.graft_oracle import METHODS
from tests.support.strategies import noise

pytestmark = pytest.mark.usefixtures("first")


def test_a_with_block_restores_what_it_found():
    with dinov2_attn.install() as handle:
        assert repr(handle) == "<dinov2_attn installed on dinov2>"
        with dinov2_attn.install():
            assert asks(load())
        assert asks(load())
    assert not hasattr(load().DinoVisionTransformer, METHODS[0])
    with pytest.raises(KeyError), dinov2_attn.install():
        raise KeyError
    assert dinov2_attn.status().grafted == ()


def test_a_live_model_is_restored_alike():
    model = small_model(load())
    with dinov2_attn.install(model) as outer:
        assert "DinoVisionTransformer" in repr(outer)
        with dinov2_attn.install(model) as inner:
            assert repr(inner) == repr(outer)
        assert asks(load())
    assert dinov2_attn.status().grafted == ()
    dinov2_attn.install(model)
    dinov2_attn.install(model).uninstall()
    assert dinov2_attn.status().grafted == ()


def test_uninstalling_twice_is_uninstalling_once():
    for target in (None, small_model(load())):
        handle = dinov2_attn.install(target)
        for _ in range(2):
            handle.uninstall()
            assert str(dinov2_attn.status()) == "nothing installed"


def test_what_a_base_class_brings_is_not_set_again():
    class Model(load().DinoVisionTransformer):
        def forward(self, x):
            return super().forward(x)

    options = {"img_size": 4, "patch_size": 2, "embed_dim": 4, "depth": 1, "num_heads": 1}
    with dinov2_attn.install(Model(**options, block_chunks=0)):
        assert METHODS[0] in vars(load().DinoVisionTransformer)
        assert not set(METHODS) & set(vars(Model))


def test_two_models_of_one_class_are_two_targets_where_their_parts_differ():
    base = upstreams.FIRST.cls("MemEffAttention")

    class Right(base):
        def forward(self, x):
            return super().forward(x)

    class Wrong(base):
        def forward(self, x):
            return x.sigmoid()

    good, right, wrong = (small_model(load()) for _ in range(3))
    right.blocks[0].attn, wrong.blocks[0].attn = Right(4, num_heads=1), Wrong(4, num_heads=1)
    images = noise(1, 3, 4, 4, seed=0)
    first = dinov2_attn.install(good)
    with pytest.raises(IncompatibleUpstreamError):
        dinov2_attn.install(wrong)
    assert good.get_last_self_attention(images).shape[-1] == 5  # the failure undid its own only
    second = dinov2_attn.install(right)
    assert len(dinov2_attn.status().recognised) == 2  # though both go by one name
    first.uninstall()
    assert right.get_last_self_attention(images).shape[-1] == 5
    second.uninstall()
    assert dinov2_attn.status().grafted == ()


def test_a_vendored_copy_is_pending_no_longer_than_nothing_of_it_is_grafted():
    upstreams.ROMA.module(upstreams.ROMA.attention)
    with dinov2_attn.install(upstreams.ROMA.package):
        assert dinov2_attn.status().pending == ()


def test_a_failing_check_leaves_nothing_behind(monkeypatch):
    """No attention class has a kernel: the blocks grafted before that is known go as well."""
    before = contents(classes())
    with monkeypatch.context() as patch:
        for cls in upstreams.FIRST.attentions:
            patch.setattr(cls, "forward", lambda self, x: x.sigmoid())
        with pytest.raises(IncompatibleUpstreamError, match="to call one kernel once"):
            dinov2_attn.install()
    assert contents(classes()) == before
    assert str(dinov2_attn.status()) == "nothing installed"
    assert not any("dinov2_attn" in type(f).__module__ for f in sys.meta_path)
    with dinov2_attn.install():  # and the next installation works
        assert asks(load())


@pytest.mark.filterwarnings("ignore::dinov2_attn.errors.UpstreamDriftWarning")
def test_a_block_that_attends_to_something_else_is_taken_at_its_kernel(monkeypatch):
    block = upstreams.FIRST.cls("Block")
    monkeypatch.setattr(block, "forward", lambda self, x: x + self.attn(x))
    with dinov2_attn.install():
        assert f"{BLOCK}.Block" in dinov2_attn.status().at_kernel
        assert asks(load())
    assert dinov2_attn.status().at_kernel == {}


def test_status_says_what_is_pending_and_what_is_there():
    upstreams.FIRST.purge()
    dinov2_attn.install()
    assert dinov2_attn.status().pending == tuple(UPSTREAM_MODULES)
    assert f"pending, until imported: {BLOCK}" in str(dinov2_attn.status())
    load()
    status = dinov2_attn.status()
    assert status.pending == ()
    assert {f"{MODEL}.DinoVisionTransformer.{name}" for name in METHODS} < set(status.grafted)
    (how,) = status.recognised.values()
    assert re.fullmatch(r"attention and blocks as in .*, verified; models as in .*, verified", how)


def test_a_status_is_printed_line_by_line():
    status = dinov2_attn.Status(("a", "b"), ("c",), ("d",), {"e": "f"}, {"g": "h"}, {"i": "j"})
    kinds = [line.rpartition(": ")[::2] for line in str(status).split("\n")]
    assert [(kind.split(",")[0].split()[0], what) for kind, what in kinds] == [
        ("grafted", "a"),
        ("grafted", "b"),
        ("patched", "c"),
        ("pending", "d"),
        ("e", "f"),
        ("weights", "h"),
        ("left", "j"),
    ]


def test_a_live_model_goes_by_the_outermost_of_its_classes():
    with dinov2_attn.install(small_model(load())):
        (target,) = dinov2_attn.status().recognised
    assert target == f"model with {MODEL}.DinoVisionTransformer"


def test_classes_from_before_a_reload_are_found_by_a_later_installation():
    """dinov2.layers still exports the old blocks, and models are built of those."""
    with upstreams.FIRST.imported_anew():
        load()
        reload()
        old = load().Block
        assert old is not upstreams.FIRST.cls("NestedTensorBlock")
        with dinov2_attn.install():
            assert is_grafted(old)
            assert asks(load())
        assert not is_grafted(old)


def test_at_no_moment_is_a_question_passed_on_and_its_answer_dropped(monkeypatch):
    """Another thread may ask between any two grafts: upstream's own forward would drop them."""
    cls, moments = load().DinoVisionTransformer, []

    def look(act):
        def watched(*args, **kwargs):
            result = act(*args, **kwargs)
            moments.append([hasattr(vars(cls)[name], "__wrapped__") for name in FORWARDS])
            return result

        return watched

    monkeypatch.setattr(GraftRegistry, "set", look(GraftRegistry.set))
    monkeypatch.setattr(Graft, "undo", look(Graft.undo))
    dinov2_attn.install().uninstall()
    assert [False, False] in moments
    assert [True, True] in moments
    assert [False, True] not in moments  # of forward and forward_features


FORWARDS = ("forward", "forward_features")
