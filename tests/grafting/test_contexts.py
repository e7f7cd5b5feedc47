"""A recording belongs to its block: to a thread, to a task of asyncio, to what leaves it."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.grafting.channel import ACTIVE, STATE
from tests.support.recordings import IMAGES, build
from tests.support.tolerances import assert_close, assert_same_bits


@pytest.fixture
def model(models):
    return build(models)


def test_tasks_of_asyncio_record_their_own_passes(model):
    async def task(barrier):
        with record(model) as maps:
            await barrier.wait()
            model(IMAGES)
            await asyncio.sleep(0)
            await barrier.wait()
        return len(maps)

    async def together():
        barrier = Turns(4)
        return await asyncio.gather(*(task(barrier) for _ in range(4)))

    assert asyncio.run(together()) == [1, 1, 1, 1]
    assert not ACTIVE.on


class Turns:
    """A barrier: asyncio has one from Python 3.11 on."""

    def __init__(self, count):
        self._count, self._waiting, self._event = count, 0, asyncio.Event()

    async def wait(self):
        self._waiting += 1
        event = self._event
        if self._waiting == self._count:
            self._waiting, self._event = 0, asyncio.Event()
            event.set()
        await event.wait()


def test_a_task_has_what_was_entered_where_it_was_made(model):
    async def task():
        model(IMAGES)

    async def outer():
        with record(model) as maps:
            await asyncio.create_task(task())
            await asyncio.create_task(task())
        return len(maps)

    assert asyncio.run(outer()) == 2


def test_a_task_is_not_edited_by_another(model):
    async def edits(inside, done):
        with dinov2_attn.edit(model, heads=0):
            inside.set()
            await done.wait()
            return model(IMAGES)

    async def plain(inside, done):
        await inside.wait()
        result = model(IMAGES)
        done.set()
        return result

    async def together():
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(edits(*events), plain(*events))

    with torch.no_grad():
        before = model(IMAGES)
        edited, unedited = asyncio.run(together())
    assert_same_bits(unedited, before)
    assert (edited - before).abs().max() > 1e-6


@pytest.mark.parametrize("edited", [False, True])
def test_a_generator_that_another_thread_closes_ends_its_recording(model, edited):
    calls = []

    def passes():
        with record(model, reduce=lambda layer, weights: calls.append(layer)):
            while True:
                yield model(IMAGES)

    def edits():
        with dinov2_attn.edit(model, heads=0):
            while True:
                yield model(IMAGES)

    with torch.no_grad():
        before = model(IMAGES)
        generator = edits() if edited else passes()
        next(generator)
        counted = len(calls)
        thread = threading.Thread(target=generator.close)
        thread.start()
        thread.join()
        after = [model(IMAGES) for _ in range(3)]
    assert len(calls) == counted
    assert_same_bits(after[-1], before)
    assert not ACTIVE.on
    with torch.no_grad(), record(model) as maps:  # and the next recording is as ever
        model(IMAGES)
    assert_close(list(maps.weights), list(dinov2_attn.attention_maps(model, IMAGES).weights))
    with dinov2_attn.edit(model, heads=0):
        model(IMAGES)
    assert (STATE.receivers, STATE.editors) == ((), ())
