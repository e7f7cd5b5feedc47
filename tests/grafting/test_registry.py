"""The list of grafts by itself."""

from __future__ import annotations

import functools

import pytest

from dinov2_attn.errors import PatchedOnTopError
from dinov2_attn.grafting.registry import GraftRegistry


def test_the_registry_knows_absence_and_who_needs_what():
    class Upstream:
        def old(self):
            return "old"

    registry, old = GraftRegistry(), vars(Upstream)["old"]
    registry.set(Upstream, "old", lambda self: "first", "a")
    registry.set(Upstream, "new", lambda self: "new", "b")
    assert registry.claim(Upstream, "old", "b")
    assert not registry.claim(Upstream, "newer", "b")
    assert not registry.claim(int, "old", "b")
    registry.release("a")  # needed by b as well
    assert Upstream().old() == "first"
    registry.release("b")
    assert vars(Upstream)["old"] is old
    assert not hasattr(Upstream, "new")
    assert list(registry) == []


def test_the_registry_rolls_back_what_is_new_after_somebody_elses_undo():
    """Dropping an entry that was undone must not hide the one that takes its place."""

    class Upstream:
        def old(self):
            return "old"

    registry, old = GraftRegistry(), vars(Upstream)["old"]
    registry.set(Upstream, "old", lambda self: "first", "a")
    Upstream.old = old
    before = list(registry)
    assert not registry.claim(Upstream, "old", "a")
    registry.set(Upstream, "old", lambda self: "second", "a")
    registry.roll_back(before)
    assert vars(Upstream)["old"] is old
    assert list(registry) == before
    registry.release("a")
    assert vars(Upstream)["old"] is old
    assert list(registry) == []


def test_a_graft_set_anew_is_there_for_all_who_needed_the_one_before():
    """A reload puts xFormers' kernel back where a live model and the package share our graft."""

    class Upstream:
        def old(self):
            return "old"

    registry, old = GraftRegistry(), vars(Upstream)["old"]
    registry.set(Upstream, "old", lambda self: "first", "a")
    assert registry.claim(Upstream, "old", "b")
    Upstream.old = old
    assert not registry.claim(Upstream, "old", "a")
    registry.set(Upstream, "old", lambda self: "second", "c")
    for target in ("a", "b"):
        registry.release(target)
        assert Upstream().old() == "second"
    registry.release("c")
    assert vars(Upstream)["old"] is old


def test_a_wrapper_from_the_classs_own_module_is_a_patch_all_the_same():
    """It has the module and the name of the class's own function; only ``__wrapped__`` tells."""

    class Upstream:
        def old(self):
            return "old"

    @functools.wraps(Upstream.old)
    def theirs(self):
        return "theirs"

    registry = GraftRegistry()
    registry.set(Upstream, "old", lambda self: "first", "a")
    Upstream.old = theirs
    with pytest.raises(PatchedOnTopError):
        registry.release("a")
    assert vars(Upstream)["old"] is theirs


def test_what_somebody_took_away_is_not_put_back_in_silence():
    class Upstream:
        def old(self):
            return "old"

    registry = GraftRegistry()
    registry.set(Upstream, "old", lambda self: "first", "a")
    del Upstream.old
    with pytest.raises(PatchedOnTopError, match="Found 'nothing'"):
        registry.release("a")
    assert not hasattr(Upstream, "old")
