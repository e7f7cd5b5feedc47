"""What is asked of every edit."""

from __future__ import annotations

from contextlib import contextmanager

from dinov2_attn.grafting.channel import ACTIVE, STATE
from tests.support.recordings import assert_nothing_on


@contextmanager
def nothing_left(model):
    """Compare the classes of ``model`` with what they were, and look for what is left on it."""
    classes = {type(module) for module in model.modules()}
    before = {cls: dict(vars(cls)) for cls in classes}
    yield
    assert {cls: dict(vars(cls)) for cls in classes} == before
    assert STATE.editors == ()
    assert not ACTIVE.edits
    assert_nothing_on(model)
