"""What each process of test_distributed.py runs: a model alone, then the same one distributed.

    python distributed.py WAY RANK WORLD STORE

Ungrafted and grafted passes are compared inside of the process, bit for bit.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dinov2_attn
from dinov2_attn import record
from tests.support import upstreams
from tests.support import xformers_visibility as xformers
from tests.support.bit_identity import assert_unchanged
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.tolerances import assert_close, assert_same_bits


def main(way, rank, world, store):
    warnings.simplefilter("ignore")
    xformers.hide()
    torch.set_num_threads(1)
    upstreams.FIRST.load()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world)
    )
    ways = {"DDP": ddp, "FSDP2": fsdp2, "FSDP2 in chunks": fsdp2_in_chunks, "pictures": pictures}
    ways[way](int(rank))
    dist.barrier()
    dist.destroy_process_group()


def ddp(rank):
    share = IMAGES[rank : rank + 1]
    passes_are_unchanged(lambda: nn.parallel.DistributedDataParallel(build(upstreams.FIRST)), share)
    with dinov2_attn.install():
        model = nn.parallel.DistributedDataParallel(build(upstreams.FIRST))
        answers_are_those_of_one_process(model, share)
        weights = model.module.get_self_attention(share)
        assert_close(weights, build(upstreams.FIRST).get_self_attention(share))


def pictures(rank):
    """The first process draws while the others train on, and all train as without pictures."""

    def trained(every):
        torch.manual_seed(0)
        model = nn.Sequential(
            build(upstreams.FIRST, drop_path_rate=0.2), nn.BatchNorm1d(8).double()
        )
        model = nn.parallel.DistributedDataParallel(model.train(), find_unused_parameters=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        to = Pages()
        logger = every and dinov2_attn.AttentionLogger(model, IMAGES, to, every=every)
        for step in range(4):
            if logger:
                assert logger(step) == (rank == 0 and step % every == 0)
            optimizer.zero_grad()
            model(IMAGES + rank).square().mean().backward()
            optimizer.step()
        return [torch.get_rng_state(), *model.state_dict().values()], to.steps

    without, _ = trained(None)
    left, steps = trained(2)
    assert_same_bits(left, without)
    assert steps == ([0, 0, 2, 2] if rank == 0 else [])


class Pages:
    def __init__(self):
        self.steps = []

    def add_image(self, name, pixels, global_step, dataformats):
        self.steps.append(global_step)


def fsdp2(rank, chunks=0):
    from torch.distributed.fsdp import register_fsdp_forward_method

    share = IMAGES[rank : rank + 1]
    passes_are_unchanged(lambda: sharded(chunks), share)
    with dinov2_attn.install():
        answers_are_those_of_one_process(sharded(chunks), share)
        # Its parameters are whole in a forward only: torch's word for what else is one.
        model = sharded(chunks)
        register_fsdp_forward_method(model, "get_self_attention")
        if chunks:  # whose blocks are asked one by one, while only a chunk gathers its own
            with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
                model.get_self_attention(share)
            return
        expected = build(upstreams.FIRST, depth=4)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                ours = model.get_self_attention(share, queries="cls")
                assert_all_close(ours, expected.get_self_attention(share, queries="cls"))
        model.get_self_attention(share)[-1].square().sum().backward()
        assert model.blocks[0].norm1.weight.grad.full_tensor().abs().sum() > 0


def fsdp2_in_chunks(rank):
    fsdp2(rank, chunks=2)


def sharded(chunks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build(upstreams.FIRST, depth=4, block_chunks=chunks)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.blocks:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh) or model


def passes_are_unchanged(make, share):
    """Features and gradients, each process with its share of the batch."""

    def run():
        model = make()
        output = model(share)
        output.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [output, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]

    assert len(assert_unchanged(run)) > 20


def answers_are_those_of_one_process(model, share):
    alone = build(upstreams.FIRST, depth=len(blocks_of(model)))
    expected = alone.get_self_attention(share)
    features = alone(share)
    output, weights = model(share, return_attention=True)
    assert_close(output, features)
    assert_close(weights, expected)
    with record(model) as maps:
        output = model(share)
    assert_close(output, features)
    assert_all_close(maps.weights, expected)
    (output.square().sum() + sum(w.square().sum() for w in maps.weights)).backward()


def blocks_of(model):
    return [m for m in model.modules() if hasattr(m, "norm1")]


if __name__ == "__main__":
    main(*sys.argv[1:])
