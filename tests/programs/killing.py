"""What test_extract_killed.py runs in a process of its own: extractions with workers, killed.

    python -m tests.programs.killing SIDE MOMENTS FOLDER

Every run is a fork of this process with a session of its own. It is killed at a random moment, and
five seconds later nothing of its session runs and no name is left in shared memory. Nothing is
imported up here, because each worker imports this file first.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

# Seconds within which everything has to be gone.
PATIENCE = 5
SHARED = Path("/dev/shm")
PREFIX = "killing"
WORKERS, IMAGES = 2, 128


def main(side, moments, folder):
    run = prepared(side, folder)
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(started(run, folder / "whole"), 0)[1]) == 0
    seconds = time.monotonic() - begun
    draw = random.Random(side)
    stopped = 0
    for moment in range(moments):
        signals = (signal.SIGKILL, signal.SIGTERM)
        running = started(run, folder / "out")
        # Half of them while workers start, which is the first second or two.
        time.sleep(draw.uniform(0, seconds if moment % 2 else seconds / 2))
        os.kill(running, signals[moment // 2 % 2])
        killed = os.waitstatus_to_exitcode(os.waitpid(running, 0)[1]) < 0
        stopped += killed
        check_gone(running)
        shutil.rmtree(folder / "out", ignore_errors=True)
    assert stopped > moments // 2, (stopped, seconds)
    print(f"{stopped} of {moments} were killed before their end; a whole run takes {seconds:.1f} s")


def prepared(side, folder):
    """Return what extracts from images of ``side`` pixels, having imported all it needs."""
    import torch

    import dinov2_attn
    from tests.support import upstreams
    from tests.support import xformers_visibility as xformers
    from tests.support.extraction import draw

    xformers.hide()
    torch.set_num_threads(1)
    upstreams.FIRST.load()
    dinov2_attn.install()
    options = {"img_size": 56, "patch_size": 14, "depth": 1, "embed_dim": 8, "num_heads": 2}
    model = upstreams.FIRST.cls("DinoVisionTransformer")(block_chunks=0, **options).eval()
    paths = [draw(folder / "image.png", (side, side), 0)] * IMAGES

    def run(out, **options):
        dinov2_attn.extract(model, paths, out, shard_size=16, workers=WORKERS, **options)

    return run


def started(run, out):
    """Return the number of a new process, the first of its session, that runs."""
    child = os.fork()
    if child == 0:
        os.setsid()
        # Semaphores of other programs have other names.
        multiprocessing.current_process()._config["semprefix"] = f"/{PREFIX}{os.getpid()}"
        try:
            run(out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def check_gone(session):
    deadline = time.monotonic() + PATIENCE
    while left := [*members(session), *names_of(session)]:
        if time.monotonic() > deadline:
            for process in members(session):
                os.kill(process[0], signal.SIGKILL)
            raise AssertionError(f"{PATIENCE} seconds after its end: {left}")
        time.sleep(0.05)


def names_of(session):
    """Return the names in shared memory of ``session``, and tensors of processes that ended."""
    names = os.listdir(SHARED)
    tensors = [name for name in names if name.startswith("torch_")]
    dead = [name for name in tensors if not Path("/proc", name.split("_")[1]).exists()]
    return dead + [name for name in names if name.startswith(f"sem.{PREFIX}{session}-")]


def members(session):
    """Return number and command of each process of ``session`` that is not a zombie."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[3]) == session:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append((int(entry.name), command[:200]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
