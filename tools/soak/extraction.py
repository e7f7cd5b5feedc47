#!/usr/bin/env python3
"""An extraction under torchrun that is killed again and again, and compared in the end.

    PYTHONPATH=. python tools/soak/extraction.py --steps 5000 --kills 60 --sides 224,518 --seed 0

Half of the kills come for each side, at random moments, to torchrun and all that it started. The
last run goes to its end. Its files are those of a run without kills, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock

FILES = 16  # distinct images; more would only fill the disk


def extract(folder, out, side, steps):
    """Run one of torchrun's processes."""
    import torch
    from tests.support import upstreams
    from tests.support import xformers_visibility as xformers

    import dinov2_attn

    xformers.hide()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    upstreams.FIRST.load()
    options = {"img_size": 56, "patch_size": 56, "depth": 1, "embed_dim": 8, "num_heads": 2}
    model = upstreams.FIRST.cls("DinoVisionTransformer")(block_chunks=0, **options).eval()
    paths = [folder / f"{i % FILES}.jpg" for i in range(steps)]
    dinov2_attn.extract(model, paths, out, shard_size=64, image_size=side, progress=False)


def started(*arguments):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [sys.executable, "-W", "ignore", *torchrun, __file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, start_new_session=True, env=environment)


def files_of(folder):
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def time_of(arguments):
    begun = time.monotonic()
    assert started(*arguments).wait() == 0
    return time.monotonic() - begun


def soak(folder, side, steps, kills, draw):
    from tests.support.extraction import draw as draw_image

    for i in range(FILES):
        draw_image(folder / f"{i}.jpg", (side, side), i)
    whole = ("run", folder, folder / "whole", side, steps)
    seconds, start = time_of(whole), time_of(whole)  # the second run finds everything finished
    longest = start + 2 * (seconds - start) / kills
    killed = 0
    while killed < kills:
        run = started("run", folder, folder / "out", side, steps)
        try:
            assert run.wait(draw.uniform(1, longest)) == 0
            break  # it came to its end
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            killed += 1
        run.wait()
        if (folder / "out" / ".lock").exists():  # held until the last rank is gone
            with FileLock(folder / "out" / ".lock", timeout=10):
                pass
    assert started("run", folder, folder / "out", side, steps).wait() == 0
    whole, out = files_of(folder / "whole"), files_of(folder / "out")
    different = sorted(n for n in out.keys() | whole if out.get(n) != whole.get(n))
    assert not different, different
    print(f"{side} pixels: {steps} images, killed {killed} times, {len(whole)} files are the same")


def main():
    if sys.argv[1:2] == ["run"]:
        folder, out, side, steps = sys.argv[2:]
        extract(Path(folder), Path(out), int(side), int(steps))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000, help="How many images.")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--sides", default="224,518")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sides = [int(side) for side in args.sides.split(",")]
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            kills = args.kills // len(sides)
            soak(Path(folder), side, args.steps, kills, random.Random(args.seed + side))


if __name__ == "__main__":
    main()
