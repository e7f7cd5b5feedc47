"""Nothing outlives an extraction: no worker, no name in shared memory, whatever ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

import dinov2_attn
from dinov2_attn.apps.demo.load import PATH as DEMO
from dinov2_attn.apps.extraction.decode import Picture
from dinov2_attn.apps.extraction.processes import PERIOD
from tests.programs.killing import members
from tests.support.extraction import draw
from tests.support.subprocesses import OFFLINE
from tests.support.tolerances import assert_same_bits

ROOT = Path(__file__).parents[3]
PACKAGE = Path(dinov2_attn.__file__).parents[1]
# Seconds within which everything has to be gone, and those that a start may take.
PATIENCE, START = 5, 120

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /dev/shm")


def environment(*more):
    path = os.pathsep.join(map(str, [ROOT, PACKAGE, *more]))
    return {**os.environ, **OFFLINE, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def wait_until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("side", [56, 518])
def test_workers_end_with_a_run_that_is_killed(side, tmp_path):
    """At 25 random moments for each size: while workers start, decode or write into a pipe."""
    command = [sys.executable, "-m", "tests.programs.killing", str(side), "25", str(tmp_path)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
time.sleep(60)
"""
CHILD = """
import os, time
from dinov2_attn.apps.extraction import processes
{before}
processes.end_with({parent})
print("waits", flush=True)
time.sleep(60)
"""
NO_SIGNAL = "processes.ctypes.CDLL = lambda _: type('', (), {'prctl': lambda *_: -1})()"


def started(child):
    """Start a parent that starts ``child``, and tells its number and its first word."""
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, child],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("before", ["", NO_SIGNAL], ids=["by a signal", "by looking"])
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ends_with_its_parent(before, way):
    child = CHILD.format(before=before, parent="os.getppid()")
    with started(child) as running:
        assert running.stdout.readline().split()[1] == "waits"
        running.send_signal(way)
        running.wait()
        wait_until(lambda: not members(running.pid), PATIENCE)


RANK = """
import os, time
from dinov2_attn.apps.extraction import processes
os.environ["TORCHELASTIC_RUN_ID"] = "none"
{before}
with processes.ending_with_torchrun():
    {inside}
print("waits", flush=True)
time.sleep(60)
"""
INSIDE = "print('waits', flush=True); time.sleep(60)"


@pytest.mark.parametrize("before", ["", NO_SIGNAL], ids=["by a signal", "by looking"])
@pytest.mark.parametrize("inside", [INSIDE, "pass"], ids=["inside", "afterwards"])
def test_a_script_ends_with_torchrun_while_it_extracts(before, inside):
    """Afterwards it may go on: it is not ours."""
    rank = RANK.format(before=before, inside=inside)
    with started(rank) as running:
        number, word = running.stdout.readline().split()
        assert word == "waits"
        running.kill()
        running.wait()
        if inside == "pass":
            time.sleep(3 * PERIOD)
            os.kill(int(number), signal.SIGKILL)  # an error if it is gone
        wait_until(lambda: not members(running.pid), PATIENCE)


def test_a_process_whose_parent_is_gone_ends_at_once():
    """Its parent is another one by now, as that of a worker that was importing torch."""
    child = CHILD.format(before="", parent=2**22 + 1)
    done = subprocess.run(
        [sys.executable, "-c", child], env=environment(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_workers_look_for_their_parent_before_they_import_torch():
    program = (
        "import sys\n"
        "from dinov2_attn.apps.extraction import processes\n"
        "def no(parent): raise SystemExit('torch' in sys.modules)\n"
        "processes.end_with = no\n"
        "class Late:\n"
        "    def __reduce__(self): return __import__, ('torch',)\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "process = processes.ending_context().Process(target=print, args=(Late(),))\n"
        "from multiprocessing.context import set_spawning_popen\n"
        "set_spawning_popen(process)\n"
        "ForkingPickler.loads(ForkingPickler.dumps(process))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "pixels",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        torch.rand(3, 4, 6),
        torch.rand(6, 4, 3).permute(2, 1, 0),
        torch.rand(3, 4, 6, dtype=torch.bfloat16),
        torch.rand(3, 4, 6, dtype=torch.float64)[:, ::2],
        torch.full((1, 2, 2), float("nan")),
    ],
    ids=lambda pixels: f"{type(pixels).__name__} {pixels.dtype}",
)
def test_a_picture_is_sent_without_shared_memory(pixels):
    """A name that is made for a tensor stays where its maker is killed before it removes it."""
    picture = Picture(None, pixels, "doubt")
    content = bytes(ForkingPickler.dumps(picture))
    assert b"torch_" not in content
    received = ForkingPickler.loads(content)
    assert received.doubt == "doubt"
    assert type(received.pixels) is type(pixels)
    if isinstance(pixels, torch.Tensor):
        assert_same_bits(received.pixels, pixels)
        assert not received.pixels.is_shared()
    else:
        assert received.pixels.tobytes() == pixels.tobytes()


COMMAND = ["-m", "dinov2_attn", "extract", "list.txt", "-o", "out", "--weights", str(DEMO)]
COMMAND += ["--workers", "1", "--shard-size", "4"]
SCRIPT = """
import dinov2_attn
from dinov2_attn.apps.demo.load import load_demo_model
if __name__ == "__main__":
    dinov2_attn.extract(load_demo_model(), "list.txt", "out", workers=1, shard_size=4)
"""


@pytest.mark.parametrize(
    ("way", "works", "script"),
    [
        (signal.SIGKILL, True, False),
        (signal.SIGTERM, True, False),
        (signal.SIGKILL, False, False),
        (signal.SIGKILL, True, True),
        (signal.SIGTERM, True, True),
    ],
)
def test_nothing_outlives_torchrun(way, works, script, first, tmp_path):
    """Its processes and their workers end with it, in the middle of their work or before it."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    path = draw(tmp_path / "image.png", (518, 518), 0)
    (tmp_path / "list.txt").write_text(f"{path.name}\n" * 1000)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    (tmp_path / "script.py").write_text(SCRIPT)
    program = ["script.py"] if script else COMMAND
    with subprocess.Popen(
        [sys.executable, *launcher, *program],
        cwd=tmp_path,
        env=environment(*Path(first.module("dinov2").__path__[0]).parents)
        | {"GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        try:
            if works:  # one at least has workers then
                wait_until(lambda: list(tmp_path.glob("out/shards/*.jsonl")), START)
                below = descendants(running.pid)
                assert sum("spawn_main" in command for _, command in below) == 2
            else:  # they have not looked for their parent yet
                wait_until(lambda: len(ranks_of(running.pid)) == 2, START)
                below = ranks_of(running.pid)
        finally:
            running.send_signal(way)
            running.wait(START)
        try:
            wait_until(lambda: not below & alive(), PATIENCE if works else START)
        finally:
            for process, _ in below & alive():
                os.kill(process, signal.SIGKILL)


def ranks_of(process):
    return {one for one in descendants(process) if "dinov2_attn extract" in one[1]}


def descendants(process):
    """Return number and command of every process that ``process`` has started, and so on."""
    parents = {one: parent for one, parent, _ in processes()}
    commands = {one: command for one, _, command in processes()}
    found = {process}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return {(one, commands.get(one, "")) for one in found - {process}}


def alive():
    return {(process, command) for process, _, command in processes()}


def processes():
    """Return number, parent and command of every process that is not a zombie."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z":
            found.append((int(entry.name), int(fields[1]), command))
    return found
