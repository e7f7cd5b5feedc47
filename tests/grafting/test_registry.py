"""The list of grafts by itself."""

from __future__ import annotations

import functools
from types import FunctionType

import pytest

from dinov2_attn._locks import Life
from dinov2_attn.errors import PatchedOnTopError
from dinov2_attn.grafting.registry import GraftRegistry, RecordingTarget
from dinov2_attn.grafting.transaction import Transaction
from tests.support.dinov2_package import passing_on


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


@pytest.fixture
def upstream():
    class Upstream:
        def old(self):
            return "old"

    return Upstream


def recording(registry, life):
    target = RecordingTarget(life)
    registry.begin(target)
    return target


def test_what_installs_replaces_what_only_records_and_both_end_as_they_like(upstream):
    """A recording in progress goes on under a later graft, whichever of the two ends first."""
    for first in ("recording", "package"):
        registry, old, life = GraftRegistry(), vars(upstream)["old"], Life()
        target = recording(registry, life)
        registry.set(upstream, "old", lambda self: "records", target)
        assert not registry.claim(upstream, "old", "package")
        registry.set(upstream, "old", lambda self: "installed", "package")
        assert registry.claim(upstream, "old", target)
        (graft,) = registry
        assert (graft.old, graft.targets) == (old, {target, "package"})
        assert not graft.only_records
        ends = [target, "package"] if first == "recording" else ["package", target]
        registry.release(ends[0])
        assert upstream().old() == "installed"
        registry.release(ends[1])
        assert vars(upstream)["old"] is old
        assert list(registry) == []


def test_a_failed_installation_gives_a_recording_its_graft_back(upstream):
    registry, life = GraftRegistry(), Life()
    registry.set(upstream, "other", lambda self: "not of a recording", "a package")
    target = recording(registry, life)
    registry.set(upstream, "old", lambda self: "records", target)
    before = list(registry)
    registry.set(upstream, "old", lambda self: "installed", "package")
    registry.set(upstream, "new", lambda self: "new", "package")
    registry.roll_back(before)
    assert upstream().old() == "records"
    assert upstream().other() == "not of a recording"
    assert not hasattr(upstream, "new")
    assert list(registry) == before


def test_uninstalling_leaves_what_a_recording_needs(upstream):
    registry, old, life = GraftRegistry(), vars(upstream)["old"], Life()
    target = recording(registry, life)
    registry.set(upstream, "old", lambda self: "both", "package")
    assert registry.claim(upstream, "old", target)
    registry.set(upstream, "new", lambda self: "new", "package")
    registry.release_all()
    assert upstream().old() == "both"
    assert not hasattr(upstream, "new")
    assert [graft.only_records for graft in registry] == [True]
    registry.release(target)
    assert vars(upstream)["old"] is old


def test_what_an_interruption_left_is_undone_and_no_more(upstream):
    """A block that was left at any line, and an installation that did not end."""
    registry, old, stays, gone = GraftRegistry(), vars(upstream)["old"], Life(), Life()
    kept, left = recording(registry, stays), recording(registry, gone)
    registry.set(upstream, "old", lambda self: "records", kept)
    registry.set(upstream, "left", lambda self: "left", left)
    for name in ("first", "second"):
        registry.begun.append(list(registry))
        registry.set(upstream, name, lambda self: "half", "package")
    del gone
    assert left.is_left
    assert not kept.is_left
    registry.heal()
    assert upstream().old() == "records"
    assert not {"left", "first", "second"} & set(vars(upstream))
    assert registry.begun == []
    registry.release(kept)
    assert vars(upstream)["old"] is old


def test_an_installation_that_was_undone_by_then_may_end(upstream):
    registry, old = GraftRegistry(), vars(upstream)["old"]
    with Transaction(registry, "package") as transaction:
        transaction.set(upstream, "old", lambda self: "half")
        registry.heal()
    assert vars(upstream)["old"] is old
    assert (list(registry), registry.begun) == ([], [])


def test_another_patch_on_top_of_what_is_left_over_is_no_error_of_the_next_call(upstream):
    registry, life = GraftRegistry(), Life()
    target = recording(registry, life)
    registry.set(upstream, "old", lambda self: "records", target)
    upstream.old = theirs = lambda self: "theirs"
    del life
    registry.heal()
    assert vars(upstream)["old"] is theirs
    assert target.is_left


def test_a_graft_that_was_interrupted_under_another_of_ours_is_undone(upstream):
    """The one below is not undone then, nor in force: ours on top is no patch of others."""
    registry, old = GraftRegistry(), vars(upstream)["old"]
    registry.set(upstream, "old", lambda self: "first", "a")
    (former,) = registry
    registry.set(upstream, "old", lambda self: "second", "b")
    registry._grafts.insert(0, former)  # as where the line that removes it was not reached
    registry.release("a")
    assert upstream().old() == "second"
    registry.release("b")
    assert vars(upstream)["old"] is old


def test_kernels_alone_may_be_released(upstream):
    """They are the globals of a module. A module's own forward is no kernel."""
    registry, module = GraftRegistry(), {"__name__": "somewhere", "kernel": 1}
    instance = {"forward": "own"}
    registry.set(upstream, "old", lambda self: "first", "a")
    registry.set(module, "kernel", 2, "a")
    registry.set(module, "added", 3, "a")
    registry.set(instance, "forward", "ours", "a")
    assert [str(graft) for graft in registry] == [
        f"{__name__}.upstream.<locals>.Upstream.old",
        "somewhere.kernel",
        "somewhere.added",
        "a module.forward",
    ]
    registry.release("a", only_kernels=True)
    assert module == {"__name__": "somewhere", "kernel": 1}
    assert upstream().old() == "first"
    assert instance == {"forward": "ours"}
    registry.release("a")
    assert upstream().old() == "old"
    assert instance == {"forward": "own"}


def test_what_is_below_ours_is_found_and_otherwise_what_is_there(upstream):
    registry, old = GraftRegistry(), vars(upstream)["old"]
    assert registry.original(upstream, "old") is old
    registry.set(upstream, "old", lambda self: "first", "a")
    assert registry.original(upstream, "old") is old
    upstream.old = theirs = lambda self: "theirs, in the place of ours"
    assert registry.original(upstream, "old") is old
    upstream.old = old
    registry.set(upstream, "old", lambda self: "second", "a")
    upstream.old = theirs
    assert registry.original(upstream, "old") is old


def test_all_patches_on_top_are_named_in_one_error(upstream):
    registry = GraftRegistry()
    for name in ("old", "new"):
        registry.set(upstream, name, lambda self: "ours", "a")
        setattr(upstream, name, lambda self: "theirs")
    with pytest.raises(PatchedOnTopError, match=r"Upstream\.old, .*Upstream\.new\.\nFound <func"):
        registry.release("a")


def test_a_function_of_another_name_or_module_is_a_patch(upstream):
    """Only the class's own function counts as what was written there."""

    def old(self):
        return "theirs"

    def renamed(self):
        return "theirs"

    renamed.__qualname__ = upstream.old.__qualname__
    foreign = FunctionType(old.__code__, {"__name__": "elsewhere"}, "old")
    foreign.__qualname__ = upstream.old.__qualname__
    for theirs, is_written in ((old, False), (foreign, False), (renamed, True), (len, False)):
        registry, written = GraftRegistry(), vars(upstream)["old"]
        below = passing_on(written)
        upstream.old = below
        registry.set(upstream, "old", lambda self: "ours", "a")
        upstream.old = theirs
        if is_written:
            registry.release("a")
        else:
            with pytest.raises(PatchedOnTopError):
                registry.release("a")
        assert vars(upstream)["old"] is theirs
        upstream.old = written
