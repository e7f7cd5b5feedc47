"""What tests of one process do with upstream's own package: import, purge, reload, ask."""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import warnings

from torch import nn

from dinov2_attn.grafting.targets import UPSTREAM_MODULES
from tests.support import upstreams
from tests.support.strategies import noise

ATTENTION, BLOCK, MODEL = UPSTREAM_MODULES


def load():
    return upstreams.FIRST.module(MODEL)


def reload():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream warns at every import without xFormers
        for name in UPSTREAM_MODULES:
            importlib.reload(upstreams.FIRST.module(name))


def classes():
    attention, block = upstreams.FIRST.module(ATTENTION), upstreams.FIRST.module(BLOCK)
    parts = [attention.Attention, attention.MemEffAttention, block.Block, block.NestedTensorBlock]
    return [*parts, load().DinoVisionTransformer]


def contents(types):
    """Everything that the classes hold, by identity."""
    return [dict(vars(cls)) for cls in types]


def is_grafted(cls):
    return "return_att" in str(inspect.signature(cls.forward))


def small_model(module):
    return module.DinoVisionTransformer(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0
    )


def asks(module):
    return small_model(module).get_last_self_attention(noise(1, 3, 4, 4, seed=0)).shape[-1] == 5


def without_kernel(base):
    """Return an attention class that calls no kernel, over upstream's or over PyTorch's module."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super(Wrong, self).__init__(*(() if base is nn.Module else (dim, num_heads)))
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.qkv(x).chunk(3, -1)[2])

    module = ATTENTION if base is nn.Module else base.__module__
    Wrong = type("Wrong", (base,), {"__init__": __init__, "forward": forward, "__module__": module})
    return Wrong


def passing_on(function):
    @functools.wraps(function)
    def theirs(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return theirs


def at_once(jobs):
    """Run each job in a thread of its own, all starting together; raise what one raised."""
    start, failures = threading.Barrier(len(jobs)), []

    def do(job):
        try:
            start.wait(timeout=30)
            job()
        except BaseException as error:  # raised below, out of the thread
            failures.append(error)

    threads = [threading.Thread(target=do, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    for failure in failures:
        raise failure
