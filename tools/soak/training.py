#!/usr/bin/env python3
"""A training that is recorded, checkpointed, copied and saved, beside one that is not.

    PYTHONPATH=. python tools/soak/training.py --steps 500 --seed 0

Blocks run under activation checkpointing. In each step one batch is recorded, with gradients in
every fifth, and a callback draws relevance. Two other threads make EMA copies and save the model
meanwhile. In the end all weights are those of the training without any of it, bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import io
import threading

import torch
from tests.support import upstreams
from tests.support import xformers_visibility as xformers
from tests.support.recordings import IMAGES, build
from torch.utils.checkpoint import checkpoint

import dinov2_attn


def prepared(seed):
    torch.manual_seed(seed)
    model = build(upstreams.FIRST).train()
    for block in model.blocks:
        block.forward = Checkpointed(block)
    return model


class Checkpointed:
    """A block that keeps no activations, as training code wraps it."""

    def __init__(self, block):
        self.block = block

    def __call__(self, tokens):
        forward = type(self.block).forward
        return checkpoint(forward, self.block, tokens, use_reentrant=False)


def train(model, steps, seed, callback):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        images = torch.randn(IMAGES.shape, generator=generator, dtype=IMAGES.dtype)
        loss = callback(step, model, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def plain(_, model, images):
    return model(images).square().mean()


def recorded(step, model, images):
    with dinov2_attn.record(model, queries="cls", gradients=step % 5 == 0) as maps:
        loss = model(images).square().mean()
    assert len(maps) == 1
    if step % 50 == 49:
        dinov2_attn.relevance(copy.deepcopy(model).eval(), IMAGES, total, method="legrad")
    return loss


def total(output):
    return output.flatten(1).sum(1)


def meanwhile(act, stop, made):
    while not stop.is_set():
        made[:] = [act(), *made[:2]]
        stop.wait(0.02)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    xformers.hide()
    torch.set_num_threads(1)
    upstreams.FIRST.load()
    expected = train(prepared(args.seed), args.steps, args.seed, plain)
    model, stop = prepared(args.seed), threading.Event()
    acts = (lambda: copy.deepcopy(model), lambda: torch.save(model, io.BytesIO()))
    copies, saves = [], []
    threads = [
        threading.Thread(target=meanwhile, args=(act, stop, made))
        for act, made in zip(acts, (copies, saves), strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        found = train(model, args.steps, args.seed, recorded)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert copies
    assert saves
    for twin in copies:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    print(f"{args.steps} steps beside copies and saves: the weights are the same")


if __name__ == "__main__":
    main()
