"""Watching what a module is given and returns, without a hook on it."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from dinov2_attn.backbone.watching import watching
from tests.support.subprocesses import python


class Base(nn.Module):
    def forward(self, x):
        return x + 1


class Derived(Base):
    pass


def test_a_subclass_that_is_watched_too_is_seen_once():
    base, derived, seen = Base(), Derived(), []
    with watching(base, after=seen.append), watching(derived, after=seen.append):
        derived(base(torch.zeros(1)))
    assert len(seen) == 2
    assert "__call__" not in vars(Base)
    assert "__call__" not in vars(Derived)


class Calling(Base):
    """A class with a ``__call__`` of its own."""

    def __call__(self, x):
        return super().__call__(x) * 2


def test_what_a_class_had_there_runs_inside_and_is_back_afterwards():
    module, own, seen = Calling(), vars(Calling)["__call__"], []
    with watching(module, before=lambda args, kwargs: seen.append((args, kwargs))):
        assert module(torch.zeros(1)) == 2
        with watching(Calling(), after=seen.append), watching(module, after=lambda out: out * 3):
            assert module(x=torch.ones(1)) == 12
    assert vars(Calling)["__call__"] is own
    assert seen == [((torch.zeros(1),), {}), ((), {"x": torch.ones(1)})]


def test_another_patch_on_top_stays_and_hides_nothing():
    module, seen = Derived(), []
    with watching(module, after=seen.append):
        ours = Derived.__call__
        Derived.__call__ = theirs = lambda self, x: ours(self, x)
        module(torch.zeros(1))
    assert len(seen) == 1
    assert vars(Derived)["__call__"] is theirs
    assert module(torch.zeros(1)) == 1
    assert len(seen) == 1
    del Derived.__call__


FORKED = """
import os, threading
from torch import nn
from dinov2_attn.backbone.watching import watching

inside, done = threading.Event(), threading.Event()

def is_set():
    return [cls for cls in (nn.Identity, nn.ReLU) if "__call__" in vars(cls)]

def watch():
    with watching(nn.Identity()), watching(nn.ReLU()):
        inside.set()
        done.wait()

thread = threading.Thread(target=watch)
thread.start()
inside.wait()
assert len(is_set()) == 2
child = os.fork()
if child == 0:
    os._exit(len(is_set()))
_, status = os.waitpid(child, 0)
done.set()
thread.join()
assert status == 0, "left in the child"
assert not is_set()
"""


OWN = """
import os
from torch import nn
from dinov2_attn.backbone.watching import watching

module, seen = nn.Identity(), []
with watching(module, after=seen.append):
    child = os.fork()
    module(3)
if child == 0:
    os._exit(seen != [3] or "__call__" in vars(nn.Identity))
_, status = os.waitpid(child, 0)
assert status == 0, "not watched in the child"
assert seen == [3]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here: threads are tested elsewhere")
@pytest.mark.parametrize("code", [FORKED, OWN], ids=["other threads", "its own"])
def test_a_child_has_the_watchers_of_the_thread_that_forked_alone(tmp_path, code):
    done = python("-W", "ignore", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
