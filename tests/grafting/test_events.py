"""Invariants 6 and 7: whatever happens in whatever order, classes hold what they should.

A machine draws events, an expectation of its own (``expected``) is kept beside the package, and
the two are compared after every step, by the identity of the very function objects.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

import dinov2_attn
from dinov2_attn.errors import IncompatibleUpstreamError, NotGraftedError, PatchedOnTopError
from tests.support.dinov2_package import at_once, passing_on, small_model, without_kernel
from tests.support.graft_oracle import (
    ABSENT,
    ATTENTIONS,
    BLOCKS,
    METHODS,
    Expected,
    behind,
    first_forward,
    may_be_patched,
    pending,
    visible,
    watched,
)
from tests.support.strategies import noise
from tests.support.upstreams import DEPTH_ANYTHING, FIRST

COPIES = (FIRST, DEPTH_ANYTHING)
IMAGES = noise(1, 3, 4, 4, seed=0)
copies = st.sampled_from(COPIES)
modules = st.sampled_from([(c, m) for c in COPIES for m in (c.attention, c.block, c.model)])
picks = st.integers(0, 2**16)


class Events(RuleBasedStateMachine):
    handles = Bundle("handles")
    models = Bundle("models")
    patches = Bundle("patches")

    def __init__(self):
        super().__init__()
        dinov2_attn.uninstall()
        for upstream in COPIES:
            upstream.purge()
        self.expected = Expected()
        self.built = []
        self.on_top = []  # patches that somebody holds the undo of

    @initialize(
        target=handles,
        imported=st.lists(copies, unique=True),
        installed=st.lists(copies, unique=True),
    )
    def begin(self, imported, installed):
        for upstream in imported:
            self.import_((upstream, upstream.model))
        return multiple(*map(self.install, installed))

    # Installing and taking off

    @rule(target=handles, upstream=copies)
    def install(self, upstream):
        before = upstream.package in self.expected.installed
        handle = dinov2_attn.install(upstream.package)
        self._installed(upstream)
        return handle, upstream.package, before

    @rule(target=handles, model=models)
    def install_model(self, model):
        classes = behind(model)
        name = frozenset(classes)
        before = name in self.expected.targets
        handle = dinov2_attn.install(model)
        self.expected.graft(name, classes)
        return handle, name, before

    @rule(upstream=copies)
    def a_with_block(self, upstream):
        before = upstream.package in self.expected.installed
        with contextlib.suppress(KeyError), dinov2_attn.install(upstream.package):
            self._installed(upstream)
            self.status_is_true()
            raise KeyError
        if not before:
            assert self._released(upstream.package)

    @rule(held=handles)
    def uninstall_a_handle(self, held):
        handle, target, _ = held
        with self._expecting(self._released(target)):
            handle.uninstall()

    @rule(held=handles)
    def leave_a_handle(self, held):
        """What was installed before stays; of a model that means that it is installed again."""
        handle, target, before = held
        if not before:
            with self._expecting(self._released(target)), handle:
                pass
        elif isinstance(target, str):
            with handle:
                pass

    @rule()
    def uninstall(self):
        with self._expecting(self.expected.release_all()):
            dinov2_attn.uninstall()

    # Imports

    @rule(where=modules)
    def import_(self, where):
        upstream, name = where
        before = [sys.modules[n] for n in watched(upstream)]
        upstream.module(name)
        if [sys.modules[n] for n in watched(upstream)] != before:
            self._arrived(upstream)

    @rule(where=modules)
    def reload(self, where):
        upstream, name = where
        if name in sys.modules:
            importlib.reload(sys.modules[name])
            self._arrived(upstream)

    @rule(upstream=copies)
    def reload_all(self, upstream):
        for name in (upstream.attention, upstream.block, upstream.model):
            self.reload((upstream, name))

    @rule(upstream=copies)
    def purge(self, upstream):
        upstream.purge()

    @rule(where=modules)
    def purge_one(self, where):
        sys.modules.pop(where[1], None)

    @rule(target=models, upstream=copies)
    def build(self, upstream):
        self.import_((upstream, upstream.model))
        model = small_model(sys.modules[upstream.model])
        self.expected.meet(behind(model))
        self.built.append(model)
        return model

    # What is left out or refused

    @rule(upstream=copies, by_reload=st.booleans())
    def a_class_is_left_out(self, upstream, by_reload):
        """The rest of its package is grafted all the same."""
        installed = upstream.package in self.expected.installed
        module = sys.modules.get(upstream.attention)
        if module is None or (by_reload and not installed):
            return
        module.Wrong = wrong = without_kernel(module.Attention)
        forward = wrong.forward
        try:
            if by_reload:
                importlib.reload(module)
                self._arrived(upstream)
            else:
                dinov2_attn.install(upstream.package)
                self._installed(upstream)
        finally:
            del module.Wrong
        assert wrong.forward is forward
        assert f"{upstream.attention}.Wrong" in dinov2_attn.status().left_out

    @rule(upstream=copies)
    def a_model_is_refused(self, upstream):
        module = sys.modules.get(upstream.model)
        if module is None:
            return
        model = small_model(module)
        model.blocks[0].attn = without_kernel(type(model.blocks[0].attn))(4, num_heads=1)
        with pytest.raises(IncompatibleUpstreamError):
            dinov2_attn.install(model)

    # Patches of others

    @rule(target=patches, pick=picks, install=st.booleans())
    def patch(self, pick, install):
        slots = [s for s in self.expected.slots.values() if may_be_patched(s)]
        if not slots:
            return multiple()
        slot = slots[pick % len(slots)]
        before = slot.now
        slot.put(passing_on(before))
        self.on_top.append((slot, before))
        if install:
            self.install(copy_of(slot))
        return slot, before

    @rule(patch=consumes(patches))
    def take_a_patch_off(self, patch):
        """In any order: whoever patched puts back what was there, and not what is below now."""
        slot, before = patch
        slot.put(before)
        self.on_top.remove(patch)

    @rule(pick=picks, install=st.booleans())
    def put_back_what_was_below_us(self, pick, install):
        held = [before for _, before in self.on_top]
        slots = [s for s in self.expected.grafted if s.in_force and s.now not in held]
        if slots:
            slot = slots[pick % len(slots)]
            slot.put(slot.graft.old)
            if install:
                self.install(copy_of(slot))

    # Threads

    @rule()
    def everything_at_once(self):
        jobs = [dinov2_attn.status]
        for upstream in COPIES:
            jobs += [functools.partial(dinov2_attn.install, upstream.package)] * 2
            jobs += [functools.partial(upstream.module, upstream.model)] * 2
        at_once(jobs)
        for upstream in COPIES:
            self._installed(upstream)

    # What holds at any point

    @invariant()
    def classes_hold_what_they_should(self):
        for slot in self.expected.slots.values():
            assert slot.held() is slot.now, slot
        for cls, bare in self.expected.bare.items():
            ours = {slot.name for slot in self.expected.slots_of(cls)}
            assert vars(cls).keys() - ours == bare.keys() - ours
            assert all(vars(cls)[name] is bare[name] for name in bare.keys() - ours)

    @invariant()
    def status_is_true(self):
        expected, status = self.expected, dinov2_attn.status()
        assert sorted(status.grafted) == sorted(str(s) for s in expected.grafted if s.in_force)
        others = [str(slot) for slot in expected.grafted if not slot.in_force]
        assert sorted(status.covered) == sorted(others)
        awaited = [c for c in COPIES if c.package in expected.installed]
        assert sorted(status.pending) == sorted(n for c in awaited for n in pending(c, expected))
        assert len(status.recognised) == len(expected.targets)
        assert all("verified" in how or "kernel" in how for how in status.recognised.values())

    @invariant()
    def the_finder_is_there_while_something_is_awaited(self):
        ours = [i for i, f in enumerate(sys.meta_path) if "dinov2_attn" in type(f).__module__]
        assert ours == ([0] if self.expected.installed else [])

    @invariant()
    def a_model_answers_if_it_is_grafted(self):
        for model in self.built[-3:]:
            slot = self.expected.slots[type(model), METHODS[1]]
            assert hasattr(model, METHODS[1]) == (slot.now is not ABSENT)
            if slot.now is ABSENT:
                continue
            answered = False
            with contextlib.suppress(NotGraftedError):
                assert model.get_last_self_attention(IMAGES).shape == (1, 1, 5, 5)
                answered = True
            # What goes by its kernel answers without a graft on each part.
            assert answered or not all(s.answers for s in self._asked(model))

    def teardown(self):
        for slot in self.expected.grafted:
            if slot.is_covered:
                slot.put(slot.graft.new)
        dinov2_attn.uninstall()
        assert self.expected.release_all()
        for slot in self.expected.slots.values():
            assert slot.held() is slot.now, slot
        assert str(dinov2_attn.status()) == "nothing installed"
        for upstream in COPIES:
            upstream.purge()

    def _installed(self, upstream):
        self.expected.installed.add(upstream.package)
        self._arrived(upstream)

    def _arrived(self, upstream):
        """Expect the classes at hand grafted if their package is installed."""
        self.expected.meet(visible(upstream))
        if upstream.package in self.expected.installed and watched(upstream):
            self.expected.graft(upstream.package, visible(upstream))

    def _released(self, target):
        released = self.expected.release(target)
        if released:
            self.expected.installed.discard(target)
        return released

    def _expecting(self, released):
        return pytest.raises(PatchedOnTopError) if not released else contextlib.nullcontext()

    def _asked(self, model):
        classes = [first_forward(m) for m in model.modules()]
        parts = [cls for cls in classes if cls.__name__ in (*ATTENTIONS, *BLOCKS)]
        return [self.expected.slots[cls, "forward"] for cls in parts]


def copy_of(slot):
    return next(c for c in COPIES if slot.owner.__module__.startswith(c.package))


# Patches of others are drift, and each import of upstream says that xFormers is not there.
TestEvents = pytest.mark.filterwarnings("ignore")(Events.TestCase)
TestEvents.settings = settings(stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
