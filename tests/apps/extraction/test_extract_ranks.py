"""Extraction by several processes of torchrun's: the same shards, whatever their number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import dinov2_attn
from dinov2_attn.apps.demo.load import PATH as DEMO
from tests.support.extraction import draw, files_of, index_of, photographs
from tests.support.subprocesses import OFFLINE

PACKAGE = Path(dinov2_attn.__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo: test_extract runs one process",
)


@pytest.fixture
def torchrun(first, tmp_path):
    """Run ``dinov2-attn extract`` by K processes, as a user types it."""
    path = os.pathsep.join(map(str, [PACKAGE, *Path(first.module("dinov2").__path__[0]).parents]))
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    # torchrun's own default where there are several: sums are added in one order then.
    environment["OMP_NUM_THREADS"] = "1"

    def run(processes, *arguments):
        # Of its own, free port: several runs at a time do not meet.
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        program = ["-m", "dinov2_attn", "extract", *arguments, "--weights", DEMO, "--workers", "0"]
        return subprocess.run(
            [sys.executable, *launcher, *map(str, program), "--image-size", "42"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    return run


def test_the_shards_are_the_same_for_every_number_of_processes(torchrun, tmp_path):
    folder = photographs(tmp_path / "in", 23)
    (folder / "broken.jpg").write_bytes(b"no image")
    outputs = {}
    for processes in (1, 2, 3):
        done = torchrun(processes, "in", "-o", f"out{processes}", "--shard-size", "5")
        # torchrun's own word for a process that ends with another status than 0.
        assert done.returncode == 1, done.stderr
        assert done.stdout.count("24 images, 1 of them unreadable, in 5 shards") == 1
        outputs[processes] = files_of(tmp_path / f"out{processes}")
    assert len(index_of(tmp_path / "out1")) == 23
    assert outputs[1] == outputs[2] == outputs[3]


def test_three_processes_continue_a_run_of_two(torchrun, tmp_path):
    photographs(tmp_path / "in", 23)
    assert torchrun(2, "in", "-o", "out", "--shard-size", "4").returncode == 0
    whole = files_of(tmp_path / "out")
    for name in ("shards/00001.jsonl", "shards/00004.safetensors", "index.jsonl"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "shards" / ".unfinished-x").mkdir()
    done = torchrun(3, "in", "-o", "out", "--shard-size", "4")
    assert done.returncode == 0, done.stderr
    assert "6 shards, 4 of them there before; this run: 8 images" in done.stdout
    assert files_of(tmp_path / "out") == whole


def test_an_error_of_the_first_is_that_of_all(torchrun, tmp_path):
    photographs(tmp_path / "in", 6)
    assert torchrun(2, "in", "-o", "out").returncode == 0
    before = files_of(tmp_path / "out")
    done = torchrun(2, "in", "-o", "out", "--heads", "mean")
    assert done.returncode != 0
    assert 'heads: null, now "mean"' in done.stderr
    assert files_of(tmp_path / "out") == before


def test_an_error_of_one_waits_for_the_others(torchrun, tmp_path):
    """The second process meets an image that cannot be read; the first has its shard by then."""
    for i in range(4):
        draw(tmp_path / "in" / f"{i}.png", (42, 42), i)
    (tmp_path / "in" / "2.png").write_bytes(b"no image")
    done = torchrun(2, "in", "-o", "out", "--shard-size", "2", "--strict")
    assert done.returncode != 0
    assert "since the run is strict" in done.stderr
    assert (tmp_path / "out" / "shards" / "00000.jsonl").exists()
    assert not (tmp_path / "out" / "index.jsonl").exists()
