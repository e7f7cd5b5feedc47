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


FORKED = """
import os, threading
from torch import nn
from dinov2_attn.backbone.watching import watching

module, inside, done = nn.Identity(), threading.Event(), threading.Event()

def watch():
    with watching(module):
        inside.set()
        done.wait()

thread = threading.Thread(target=watch)
thread.start()
inside.wait()
assert "__call__" in vars(nn.Identity)
child = os.fork()
if child == 0:
    os._exit("__call__" in vars(nn.Identity))
_, status = os.waitpid(child, 0)
done.set()
thread.join()
assert status == 0, "left in the child"
assert "__call__" not in vars(nn.Identity)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here: threads are tested elsewhere")
def test_a_child_has_no_watchers_of_other_threads(tmp_path):
    done = python("-W", "ignore", "-c", FORKED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
