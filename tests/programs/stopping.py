"""What test_interrupted.py runs: calls that ``KeyboardInterrupt`` ends at any of their lines.

    python -m tests.programs.stopping NAME COUNT SEED

An interrupt comes at a line of this package, drawn among all that the call runs. Afterwards this
thread's switches and modes are as before, the model gives the same bits, and the next call of every
kind works and leaves no graft.
"""

from __future__ import annotations

import linecache
import random
import sys
import threading
from pathlib import Path

import torch

import dinov2_attn
from dinov2_attn.backbone import watching
from dinov2_attn.grafting.asked import ASKED
from dinov2_attn.grafting.channel import ACTIVE, STATE
from dinov2_attn.grafting.registry import LOCK, REGISTRY
from dinov2_attn.kernels import capture
from tests.support import upstreams
from tests.support import xformers_visibility as xformers
from tests.support.recordings import IMAGES, build
from tests.support.tolerances import assert_same_bits

PACKAGE = str(Path(dinov2_attn.__file__).parent)


def recorded(model):
    with dinov2_attn.record(model, gradients=True) as maps:
        output = model(IMAGES)
    total(output).sum().backward()
    return maps[0].grid


def edited(model):
    with dinov2_attn.edit(model, keys="registers" if model.num_register_tokens else "cls"):
        return model(IMAGES)


def asked(model):
    with dinov2_attn.install():
        model(IMAGES, return_attention=True)
        return model.get_self_attention(IMAGES)


def installed(model):
    dinov2_attn.install()
    dinov2_attn.status()
    dinov2_attn.uninstall()


def relevant(model):
    return dinov2_attn.relevance(model, IMAGES, total, method="legrad")


def explained(model):
    dinov2_attn.rollout(model, IMAGES)
    return dinov2_attn.artifact_tokens(model, IMAGES)


CALLS = {
    "record": recorded,
    "edit": edited,
    "ask": asked,
    "install": installed,
    "relevance": relevant,
    "explain": explained,
}


def total(output):
    return output.flatten(1).sum(1)


class Stopper:
    """Counts the lines of the package that a call runs, or raises at one of them."""

    def __init__(self, at=None):
        self.lines, self._at, self.where = 0, at, None

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self._at is not None and self.lines >= self._at and not _is_lock(frame):
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def run(self, act):
        sys.settrace(self)
        try:
            act()
        finally:
            sys.settrace(None)


def _is_lock(frame):
    """Return whether a lock is taken or released here. No signal comes in between, a trace does."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return line.startswith("with ") and any(n in line for n in ("LOCK", "_lock", "_ONE_AT_A_TIME"))


def state():
    """Everything that one thread may see of another call."""
    return {
        "receivers": STATE.receivers,
        "editors": STATE.editors,
        "active": ACTIVE.on,
        "edits": ACTIVE.edits,
        "listener": ASKED.listener,
        "published": ASKED.published,
        "capture": capture.current_capture(),
        "watches": watching._HERE.watches,
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "modes": torch._C._len_torch_function_stack(),
        "lock": LOCK._is_owned(),
    }


def healed(model):
    """The next call, of any kind."""
    with dinov2_attn.record(model) as maps:
        model(IMAGES)
    assert len(maps) == 1
    with dinov2_attn.edit(model, heads=0):
        model(IMAGES)
    dinov2_attn.artifact_tokens(model, IMAGES)
    with dinov2_attn.install():
        model(IMAGES, return_attention=True)


def main(name, count, seed):
    xformers.hide()
    torch.set_num_threads(1)
    upstreams.FIRST.load()
    model = build(upstreams.FIRST)
    if not hasattr(model, "num_register_tokens"):
        model.num_register_tokens = 0
    call, draw = CALLS[name], random.Random(seed)
    call(model)
    classes = {type(module): dict(vars(type(module))) for module in model.modules()}
    instances = [dict(vars(module)) for module in model.modules()]
    before, output = state(), model(IMAGES)
    counter = Stopper()
    counter.run(lambda: call(model))
    for _ in range(count):
        stopper = Stopper(draw.randrange(1, counter.lines + 1))
        try:
            stopper.run(lambda: call(model))
        except KeyboardInterrupt:
            pass
        else:
            continue  # shorter this time: something was cached
        dinov2_attn.uninstall() if name in ("ask", "install") else None
        at_once = state()
        wrong = {key for key in before if at_once[key] != before[key]} - {"active", "edits"}
        healed(model)
        dinov2_attn.uninstall()
        assert state() == before, (stopper.where, state())
        assert not wrong - {"receivers", "editors", "watches"}, (stopper.where, wrong)
        assert list(REGISTRY) == [], (stopper.where, [*map(str, REGISTRY)])
        for cls, own in classes.items():
            assert vars(cls).get("forward") is own.get("forward"), (stopper.where, cls)
            assert vars(cls).get("__call__") is own.get("__call__"), (stopper.where, cls)
        for module, own in zip(model.modules(), instances, strict=True):
            assert vars(module).keys() == own.keys(), stopper.where
            assert module.training == own["training"], stopper.where
            assert not module._forward_hooks, stopper.where
            assert not module._forward_pre_hooks, stopper.where
        assert_same_bits(model(IMAGES), output, stopper.where)
        check_lock()
    print(f"{name}: {count} interrupts among {counter.lines} lines")


def check_lock():
    """Another thread gets the lock."""
    thread = threading.Thread(target=dinov2_attn.status)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
