"""DDP and FSDP2 on two processes of this machine: features, gradients, every way to ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import dinov2_attn

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    fully_shard = None

ROOT = Path(__file__).parents[2]
WORLD = 2

needs_fsdp2 = pytest.mark.skipif(
    fully_shard is None, reason="this torch has no fully_shard (FSDP2): DDP runs here"
)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo: test_machinery runs DataParallel's fall-through",
)
@pytest.mark.parametrize(
    "way",
    [
        "DDP",
        "pictures",
        pytest.param("FSDP2", marks=needs_fsdp2),
        pytest.param("FSDP2 in chunks", marks=needs_fsdp2),
    ],
)
def test_two_processes(way, tmp_path):
    """They meet in a file: no port is taken, and none can be taken by another."""
    paths = [str(ROOT), str(Path(dinov2_attn.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    store = tmp_path / "store"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.programs.distributed",
                way,
                str(rank),
                str(WORLD),
                store,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
