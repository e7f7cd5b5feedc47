#!/usr/bin/env python3
"""Mixed calls on one model from threads and tasks of asyncio, some of them interrupted.

    PYTHONPATH=. python tools/soak/mixed.py --steps 20000 --seed 0

Each call is drawn: a plain pass, a recording, an edit, a question, relevance, a copy, a pickle. A
timer interrupts threads at random moments. Plain passes have the same bits all the time, and at the
end nothing is left: no receiver, mode, hook or graft.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import ctypes
import io
import random
import threading
import time

import torch
from tests.programs import stopping
from tests.support import upstreams
from tests.support import xformers_visibility as xformers
from tests.support.recordings import IMAGES, build

import dinov2_attn
from dinov2_attn.errors import Dinov2AttnError
from dinov2_attn.grafting.channel import ACTIVE
from dinov2_attn.grafting.registry import REGISTRY

THREADS, TASKS = 8, 8


class Soak:
    """The calls, and how many were made."""

    def __init__(self, steps, seed):
        upstreams.FIRST.load()
        self.model = build(upstreams.FIRST)
        dinov2_attn.install()
        with torch.no_grad():
            self.expected = self.model(IMAGES)
        # Once before: an interrupted import may leave a lock of Python's behind.
        for call in (self.copied, self.asked, self.recorded, self.edited, self.explained):
            call()
        self.steps, self.seed = steps, seed
        self.made, self.interrupts, self.wrong = 0, 0, []
        self.lock = threading.Lock()

    def plain(self):
        with torch.no_grad():
            assert torch.equal(self.model(IMAGES), self.expected)

    def copied(self):
        twin = copy.deepcopy(self.model)
        torch.save(self.model, io.BytesIO())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())

    def asked(self):
        self.model.get_last_self_attention(IMAGES)

    def recorded(self):
        with dinov2_attn.record(self.model) as maps:
            self.model(IMAGES)
        assert len(maps) == 1

    def edited(self):
        with dinov2_attn.edit(self.model, heads=0), torch.no_grad():
            assert not torch.equal(self.model(IMAGES), self.expected)

    def explained(self):
        stopping.relevant(self.model)
        stopping.explained(self.model)

    def call(self, draw):
        kinds = (self.plain, self.copied, self.asked, self.recorded, self.edited, self.explained)
        draw.choices(kinds, (4, 1, 2, 3, 3, 1))[0]()

    def is_over(self):
        with self.lock:
            self.made += 1
            return self.made > self.steps or self.wrong

    def in_thread(self, number):
        draw, is_over = random.Random(self.seed * 1000 + number), False
        while not is_over:
            with contextlib.suppress(KeyboardInterrupt):  # between two calls
                self.until_over(draw)
                is_over = True

    def until_over(self, draw):
        while True:
            try:
                if self.is_over():
                    return
                self.call(draw)
            except KeyboardInterrupt:
                self.interrupts += 1
            except Dinov2AttnError as error:
                self.wrong.append(error)
            except AssertionError as error:
                self.wrong.append(error)

    async def task(self, number):
        draw = random.Random(self.seed * 1000 + 100 + number)
        while not self.is_over():
            with dinov2_attn.record(self.model) as maps:
                await asyncio.sleep(0)
                self.model(IMAGES)
                await asyncio.sleep(draw.random() / 1000)
            if len(maps) != 1:
                self.wrong.append(AssertionError(f"{len(maps)} passes in a task"))

    async def tasks(self):
        await asyncio.gather(*(self.task(number) for number in range(TASKS)))

    def run(self):
        threads = [threading.Thread(target=self.in_thread, args=(i,)) for i in range(THREADS)]
        loop = threading.Thread(target=lambda: asyncio.run(self.tasks()))
        for thread in (*threads, loop):
            thread.start()
        draw = random.Random(self.seed)
        while loop.is_alive() or any(thread.is_alive() for thread in threads):
            time.sleep(draw.uniform(0.01, 0.1))
            victim = draw.choice(threads)
            if victim.is_alive():
                interrupt = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident), interrupt)
        self.check()

    def check(self):
        if self.wrong:
            raise self.wrong[0]
        dinov2_attn.uninstall()
        stopping.healed(self.model)
        dinov2_attn.uninstall()
        assert not ACTIVE.on
        assert not ACTIVE.edits
        assert list(REGISTRY) == []
        for module in self.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        self.plain()
        print(f"{self.steps} calls, {self.interrupts} of them interrupted, nothing is left")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    xformers.hide()
    torch.set_num_threads(1)
    Soak(args.steps, args.seed).run()


if __name__ == "__main__":
    main()
