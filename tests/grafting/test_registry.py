"""The list of grafts by itself."""

from __future__ import annotations

import functools

import pytest

from dinov2_attn.errors import PatchedOnTopError
from dinov2_attn.grafting.registry import Ledger


def test_the_ledger_knows_absence_and_who_needs_what():
    class Upstream:
        def old(self):
            return "old"

    ledger, old = Ledger(), vars(Upstream)["old"]
    ledger.set(Upstream, "old", lambda self: "first", "a")
    ledger.set(Upstream, "new", lambda self: "new", "b")
    assert ledger.keep(Upstream, "old", "b")
    assert not ledger.keep(Upstream, "newer", "b")
    assert not ledger.keep(int, "old", "b")
    ledger.release("a")  # needed by b as well
    assert Upstream().old() == "first"
    ledger.release("b")
    assert vars(Upstream)["old"] is old
    assert not hasattr(Upstream, "new")
    assert list(ledger) == []


def test_the_ledger_rolls_back_what_is_new_after_somebody_elses_undo():
    """Dropping an entry that was undone must not hide the one that takes its place."""

    class Upstream:
        def old(self):
            return "old"

    ledger, old = Ledger(), vars(Upstream)["old"]
    ledger.set(Upstream, "old", lambda self: "first", "a")
    Upstream.old = old
    before = list(ledger)
    assert not ledger.keep(Upstream, "old", "a")
    ledger.set(Upstream, "old", lambda self: "second", "a")
    ledger.roll_back(before)
    assert vars(Upstream)["old"] is old
    assert list(ledger) == before
    ledger.release("a")
    assert vars(Upstream)["old"] is old
    assert list(ledger) == []


def test_a_graft_set_anew_is_there_for_all_who_needed_the_one_before():
    """A reload puts xFormers' kernel back where a live model and the package share our graft."""

    class Upstream:
        def old(self):
            return "old"

    ledger, old = Ledger(), vars(Upstream)["old"]
    ledger.set(Upstream, "old", lambda self: "first", "a")
    assert ledger.keep(Upstream, "old", "b")
    Upstream.old = old
    assert not ledger.keep(Upstream, "old", "a")
    ledger.set(Upstream, "old", lambda self: "second", "c")
    for target in ("a", "b"):
        ledger.release(target)
        assert Upstream().old() == "second"
    ledger.release("c")
    assert vars(Upstream)["old"] is old


def test_a_wrapper_from_the_classs_own_module_is_a_patch_all_the_same():
    """It has the module and the name of the class's own function; only ``__wrapped__`` tells."""

    class Upstream:
        def old(self):
            return "old"

    @functools.wraps(Upstream.old)
    def theirs(self):
        return "theirs"

    ledger = Ledger()
    ledger.set(Upstream, "old", lambda self: "first", "a")
    Upstream.old = theirs
    with pytest.raises(PatchedOnTopError):
        ledger.release("a")
    assert vars(Upstream)["old"] is theirs


def test_what_somebody_took_away_is_not_put_back_in_silence():
    class Upstream:
        def old(self):
            return "old"

    ledger = Ledger()
    ledger.set(Upstream, "old", lambda self: "first", "a")
    del Upstream.old
    with pytest.raises(PatchedOnTopError, match="Found 'nothing'"):
        ledger.release("a")
    assert not hasattr(Upstream, "old")
