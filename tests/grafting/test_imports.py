"""What imports find and leave behind while they are watched, in this process."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import threading
import time
import types
import warnings

import pytest

import dinov2_attn
from dinov2_attn import _compat_imports
from dinov2_attn.errors import IncompatibleUpstreamError
from tests.support import upstreams
from tests.support.dinov2_package import ATTENTION, asks, at_once, is_grafted, load

pytestmark = pytest.mark.usefixtures("first")


def test_odd_entries_among_the_modules_do_no_harm():
    sys.modules["odd"] = types.SimpleNamespace(__name__="odd")
    try:
        with pytest.raises(IncompatibleUpstreamError, match="Found none in odd"):
            dinov2_attn.install("odd")
        assert dinov2_attn.status().grafted == ()
    finally:
        del sys.modules["odd"]


def test_a_watched_module_can_be_looked_at():
    load()
    dinov2_attn.install()
    del sys.modules[ATTENTION]
    spec = importlib.util.find_spec(ATTENTION)
    assert "class Attention" in spec.loader.get_source(ATTENTION)


class Slow:
    """A package whose import, begun in a thread, waits: looked for, made or running."""

    def __init__(self, folder, waits_while):
        (folder / "slow_vit").mkdir()
        attention = inspect.getsource(upstreams.FIRST.module(ATTENTION))
        text = f"{attention}\nimport slow_vit; slow_vit.wait('runs')\n"
        (folder / "slow_vit" / "__init__.py").write_text("")
        (folder / "slow_vit" / "attention.py").write_text(text)
        self._waits_while = waits_while
        self._begun, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._import)

    def begin(self):
        importlib.import_module("slow_vit").wait = self.wait
        sys.meta_path.insert(0, self)
        self._thread.start()
        assert self._begun.wait(60)

    def end(self):
        self._end.set()
        self._thread.join(60)

    def wait(self, what):
        if what == self._waits_while:
            self._begun.set()
            self._end.wait(60)

    def find_spec(self, name, path=None, target=None):
        if name != "slow_vit.attention":
            return None
        self.wait("is looked for")
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader.create_module = lambda _: self.wait("is made")
        return spec

    def _import(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of later revisions, without xFormers
            self.module = importlib.import_module("slow_vit.attention")


@pytest.fixture(params=["is looked for", "is made", "runs"])
def slow(tmp_path, monkeypatch, request):
    monkeypatch.syspath_prepend(tmp_path)
    slow = Slow(tmp_path, request.param)
    yield slow
    sys.meta_path.remove(slow)
    for name in ("slow_vit", "slow_vit.attention"):
        sys.modules.pop(name, None)


def test_an_installation_waits_for_an_import_under_way(slow):
    """Its import began before the finder was there, so the finder does not see it."""
    slow.begin()
    threading.Timer(0.5, slow.end).start()
    with dinov2_attn.install("slow_vit"):
        assert is_grafted(sys.modules["slow_vit.attention"].Attention)


def test_an_installation_does_not_wait_for_an_import_that_is_not_its_own(slow):
    """That one may wait for the thread that installs, and neither would ever end.

    While a module is looked for, Python 3.10 itself keeps all other imports waiting.
    """
    slow.begin()
    try:
        installing = threading.Thread(
            target=dinov2_attn.install, args=("not_imported",), daemon=True
        )
        installing.start()
        installing.join(5)
        assert not installing.is_alive()
    finally:
        slow.end()


def test_a_python_that_shows_no_locks_of_modules_installs_all_the_same(monkeypatch):
    """They are CPython's own."""
    monkeypatch.setattr(_compat_imports, "_bootstrap", types.SimpleNamespace())
    with dinov2_attn.install():
        assert asks(load())


def test_an_installation_that_is_taken_back_while_it_waits_sets_nothing(slow):
    """Otherwise grafts would stand without a finder, installed for nobody."""
    slow.begin()
    waiting = threading.Thread(target=dinov2_attn.install, args=("slow_vit",))
    waiting.start()
    for _ in range(1000):
        if dinov2_attn.status().pending:
            break
        time.sleep(0.01)
    dinov2_attn.uninstall()
    slow.end()
    waiting.join(60)
    assert not is_grafted(slow.module.Attention)
    assert str(dinov2_attn.status()) == "nothing installed"


def test_a_second_installation_leaves_the_finder_where_it_is(monkeypatch):
    """Another thread may be going through the list, and would skip what moves up in it."""

    class Finders(list):
        def remove(self, finder):
            raise AssertionError("an import that looks now would not be seen")

        insert = __delitem__ = remove

    dinov2_attn.install()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", Finders(sys.meta_path))
        dinov2_attn.install()
        assert dinov2_attn.install("not_imported")
    dinov2_attn.uninstall()


def test_the_module_is_as_it_would_be_without_the_finder():
    upstreams.FIRST.purge()
    plain = load()
    loader, spec = type(plain.__loader__), plain.__spec__
    upstreams.FIRST.purge()
    dinov2_attn.install()
    watched = load()
    assert type(watched.__loader__) is type(watched.__spec__.loader) is loader
    assert watched.__spec__.origin == spec.origin
    assert inspect.getsource(watched.BlockChunk).startswith("class")


def test_threads_that_import_and_install_at_once():
    for _ in range(5):
        upstreams.FIRST.purge()
        at_once([dinov2_attn.install, load, dinov2_attn.install, load, dinov2_attn.status])
        assert asks(load())
        dinov2_attn.uninstall()


def test_another_finder_that_delegates_does_not_go_round_in_circles():
    class Delegating:
        def find_spec(self, name, path=None, target=None):
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):
                    return spec
            return None

    upstreams.FIRST.purge()
    other = Delegating()
    dinov2_attn.install()
    sys.meta_path.insert(0, other)
    try:
        assert asks(load())
    finally:
        sys.meta_path.remove(other)
