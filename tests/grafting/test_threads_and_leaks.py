"""Many threads and many calls: the same answers as one thread's first, and nothing left behind."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from functools import partial

import pytest
import torch

import dinov2_attn
from dinov2_attn import record, rollout
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.grafting.channel import STATE
from dinov2_attn.grafting.modules import ASKED
from tests.support import upstreams
from tests.support.dinov2_package import at_once
from tests.support.recordings import assert_nothing_on
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close

IMAGES = noise(2, 3, 4, 6, seed=0)


def build(upstream, depth=2):
    model = upstream.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=8, depth=depth, num_heads=2, block_chunks=0
    )
    return randomise(model, 1)


def _both(output, attentions):
    return [output, *attentions]


def _record(model, **options):
    with record(model, **options) as maps:
        output = model(IMAGES)
    return [output, *maps.weights]


def _fail(model):
    """An exception in the middle of a pass that is recorded, and of one that is asked."""

    def stop(layer, weights):
        raise KeyError(layer)

    with pytest.raises(KeyError), record(model, reduce=stop):
        model(IMAGES)
    with pytest.raises(InvalidInputError):
        model.get_self_attention(IMAGES[:, :2])
    with pytest.raises(NotRecordedError), record(model):
        pass
    return []


WAYS = {
    "plain": lambda m: [m(IMAGES)],
    "features": lambda m: [m.forward_features(IMAGES)["x_norm_patchtokens"]],
    "all": lambda m: m.get_self_attention(IMAGES),
    "mean": lambda m: m.get_self_attention(IMAGES, heads="mean"),
    "last of CLS": lambda m: [m.get_last_self_attention(IMAGES, queries="cls")],
    "list": lambda m: [t for pair in m.get_self_attention([IMAGES, IMAGES[:1]]) for t in pair],
    "pass": lambda m: _both(*m(IMAGES, return_attention=True)),
    "recorded": _record,
    "reduced": lambda m: _record(m, reduce=lambda layer, weights: weights.mean(1)),
    "kept": lambda m: _record(m, queries="cls", reduce=lambda layer, weights: weights),
    "rollout": lambda m: [rollout(m, IMAGES).weights],
    "failing": _fail,
}


def answers(model):
    """What each way gives, with grad and without."""
    found = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found |= {(name, grad): list(ask(model)) for name, ask in WAYS.items()}
    return found


def assert_same(ours, theirs, name):
    assert len(ours) == len(theirs), name
    for one, expected in zip(ours, theirs, strict=True):  # none of those that fail
        assert_close(one, expected, name)


def assert_nothing_left(model):
    assert (STATE.receivers, ASKED.listener, ASKED.published) == ((), None, None)
    assert_nothing_on(model)


def leaving_nothing(job):
    """Return ``job``, checked to leave its thread as it found it."""

    def do():
        job()
        assert (STATE.receivers, ASKED.listener, ASKED.published) == ((), None, None)

    return do


@pytest.fixture
def _often():
    """Let threads take turns within a layer, and not once in many passes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_often")
def test_eight_threads_get_the_answers_of_one(models):
    """In every way at once: what one thread records is nothing to what another asks."""
    model = build(models)
    expected = answers(model)
    ways = list(WAYS.items())

    def work(first):
        for i in range(3 * len(ways)):
            name, ask = ways[(first + i) % len(ways)]
            with torch.set_grad_enabled(grad := bool(i % 2)):
                assert_same(ask(model), expected[name, grad], name)

    at_once([leaving_nothing(partial(work, first)) for first in range(8)])
    assert_nothing_left(model)


@pytest.mark.usefixtures("_often")
def test_other_targets_come_and_go_meanwhile():
    """Grafts of one package are nothing to a model of another."""
    with dinov2_attn.install():
        model = build(upstreams.FIRST)
        expected = answers(model)
        before = set(dinov2_attn.status().grafted)
        others = [upstreams.ROMA, upstreams.LIGHTLY, upstreams.ANOMALIB]
        for other in others:
            other.module(other.attention)
            other.module(other.block)

        def ask():
            for _ in range(10):
                for (name, grad), answer in expected.items():
                    with torch.set_grad_enabled(grad):
                        assert_same(WAYS[name](model), answer, name)

        def install(other):
            for _ in range(5):
                with dinov2_attn.install(other.package):
                    assert other.package in str(dinov2_attn.status())

        jobs = [lambda other=other: install(other) for other in others]
        at_once([leaving_nothing(job) for job in [ask] * 5 + jobs])
        assert_nothing_left(model)
        assert set(dinov2_attn.status().grafted) == before


# Ten thousand calls


def resident():
    """The bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def soak(model, expected, calls):
    ways = [(name, grad) for name, grad in expected if name != "failing"]
    for i in range(calls):
        # Exceptions cost the most time, being formatted by pytest: one call in fifty.
        key = ("failing", False) if i % 50 == 49 else ways[i % len(ways)]
        with torch.set_grad_enabled(key[1]):
            answer = WAYS[key[0]](model)
        if i % 10 == 0 or i % 50 == 49:
            assert_same(answer, expected[key], key)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="reads /proc; the threads above check answers and hooks anywhere",
)
def test_ten_thousand_calls_leave_nothing_behind():
    with dinov2_attn.install():
        model = build(upstreams.FIRST, depth=1)
        expected = answers(model)
        soak(model, expected, 1000)  # whatever is made once is made by now
        tracemalloc.start()
        soak(model, expected, 200)
        before, live = tracemalloc.get_traced_memory()[0], tensors()
        soak(model, expected, 800)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert grown < 100_000, f"{grown} bytes of Python in 800 calls"
        memory = resident()
        soak(model, expected, 8000)
        assert tensors() == live
        assert resident() - memory < 8 * 2**20, f"{resident() - memory} bytes in 8000 calls"
        assert_nothing_left(model)
