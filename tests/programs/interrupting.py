"""What test_extract_interrupted.py runs in a process of its own: extractions that are killed.

    python interrupting.py WAY FOLDER

Every run is a fork of this process, which has run once and so imported all of it; a killed one
is followed by one that is not, and what that leaves is compared with what the first run left.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import dinov2_attn
from dinov2_attn.errors import UnwritableOutputError
from tests.support import upstreams
from tests.support import xformers_visibility as xformers
from tests.support.extraction import build, files_of, photographs

OPTIONS = {"shard_size": 5, "queries": None, "artifacts": True}


def main(way, folder):
    xformers.hide()
    torch.set_num_threads(1)
    upstreams.FIRST.load()
    with dinov2_attn.install():
        images = photographs(Path(folder) / "in", 13)
        (images / "broken.jpg").write_bytes(b"no image")
        model = build(upstreams.FIRST)

        def run(out):
            dinov2_attn.extract(model, images, out, **OPTIONS)

        reference = Path(folder) / "reference"
        run(reference)
        started = time.perf_counter()
        assert forked(lambda: run(Path(folder) / "timed")) == 0
        seconds = time.perf_counter() - started
        ways = {"every call": every_call, "any time": any_time, "disk full": disk_full}
        ways[way](run, Path(folder) / "out", files_of(reference), seconds)


def every_call(run, out, expected, _):
    """Killed before the first, the second, … call that concerns the output folder."""
    calls = 0
    while forked(lambda: run(out), before=lambda count=calls: die_at_call(out, count)):
        goes_on(run, out, expected)
        calls += 1
    assert calls > 40, calls  # opened, moved, removed: a hook that sees none proves nothing


def any_time(run, out, expected, seconds):
    draw = random.Random(0)
    killed = 0
    for _ in range(25):
        delay = draw.uniform(0, seconds)
        for _ in range(draw.randint(1, 3)):  # and killed again when it goes on
            alarm = lambda: signal.setitimer(signal.ITIMER_REAL, delay)  # noqa: E731, B023
            killed += forked(lambda: run(out), before=alarm) != 0
        goes_on(run, out, expected)
    assert killed > 10, killed


def disk_full(run, out, expected, _):
    """No file may be longer than so many bytes: every writer gets to hear of it."""
    refused = 0
    for most in (0, 1, 100, 300, 1000, 2000, 3000, 4000, 10**9):
        status = forked(lambda: unwritable(lambda: run(out)), before=lambda most=most: limit(most))
        assert status in (0, 3), status
        refused += status == 3
        assert not list(out.rglob(".unfinished-*"))
        goes_on(run, out, expected)
    assert refused > 4, refused


def goes_on(run, out, expected):
    """What is there is whole; what is missing comes, and in the end all is as expected."""
    for name, content in (files_of(out) if out.exists() else {}).items():
        if "unfinished" not in name:
            assert content == expected[name], name
    assert forked(lambda: run(out)) == 0
    assert files_of(out) == expected
    shutil.rmtree(out)


def forked(act, before=lambda: None):
    """Return the exit status of a child that does ``act``: 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            before()
            act()
            os._exit(0)
        except BaseException as error:
            if isinstance(error, SystemExit):
                os._exit(error.code)
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) in (0, 3), "see above"
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def die_at_call(out, count):
    left = [count]

    def hook(event, arguments):
        if event.startswith(("open", "os.", "shutil.")) and any(
            isinstance(one, str | os.PathLike) and str(out) in str(one) for one in arguments
        ):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)


def limit(most):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def unwritable(act):
    try:
        act()
    except UnwritableOutputError as error:
        raise SystemExit(3) from error


if __name__ == "__main__":
    main(*sys.argv[1:])
