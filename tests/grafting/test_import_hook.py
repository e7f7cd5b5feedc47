"""The finder by itself: whom it asks, what, and who may call it."""

from __future__ import annotations

import sys
import types
from importlib.abc import Loader
from importlib.machinery import ModuleSpec

import pytest

from dinov2_attn.grafting.import_hook import Finder
from tests.support.dinov2_package import at_once


class Plain(Loader):
    def exec_module(self, module):
        module.ran = True


class Other:
    """Another finder, which remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def find_spec(self, name, path=None, target=None):
        self.asked.append((name, path, target))
        return ModuleSpec(name, Plain()) if name == "wanted" else None


@pytest.fixture
def arrived():
    return []


@pytest.fixture
def finder(arrived):
    return Finder(lambda name: name in ("wanted", "absent"), arrived.append)


@pytest.fixture
def other(finder, monkeypatch):
    """Behind our finder; between them an entry that is no finder, which Python passes over."""
    other = Other()
    monkeypatch.setattr(sys, "meta_path", [finder, object(), other])
    return other


def test_others_are_asked_what_python_asked(finder, other):
    """A reload hands over the module it is for: other finders may go by it."""
    target = types.ModuleType("wanted")
    assert finder.find_spec("wanted", ["folder"], target) is not None
    assert other.asked == [("wanted", ["folder"], target)]


def test_what_is_not_wanted_or_not_there_is_left_to_others(finder, other):
    assert finder.find_spec("unwanted") is None
    assert other.asked == []
    assert finder.find_spec("absent") is None
    assert other.asked == [("absent", None, None)]


def test_what_was_found_is_called_back_once_it_ran(finder, other, arrived):
    module = types.ModuleType("wanted")
    finder.find_spec("wanted").loader.exec_module(module)
    assert module.ran
    assert arrived == [module]
    assert isinstance(module.__loader__, Plain)


def test_an_import_in_any_thread_is_seen(finder, other):
    """Whoever is being asked is known for each thread, and none has been asked at first."""
    found = []
    for _ in range(2):
        at_once([lambda: found.append(finder.find_spec("wanted"))] * 2)
    assert None not in found
    assert len(other.asked) == len(found) == 4
