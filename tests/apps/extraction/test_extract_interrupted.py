"""Extractions that are killed, that run out of room, or that meet another one at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

import dinov2_attn
from dinov2_attn.apps.demo.load import PATH as DEMO
from dinov2_attn.apps.extraction.layout import LOCK
from dinov2_attn.errors import UnwritableOutputError
from tests.support.extraction import build, files_of, photographs
from tests.support.subprocesses import OFFLINE

ROOT = Path(__file__).parents[3]
PACKAGE = Path(dinov2_attn.__file__).parents[1]

needs_signals = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="no SIGKILL and no fork here: files are moved in one step"
)


@needs_signals
@pytest.mark.parametrize("way", ["every call", "any time", "disk full"])
def test_an_interrupted_run_ends_with_the_same_bytes(way, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGE)])}
    command = [sys.executable, "-m", "tests.programs.interrupting", way, tmp_path]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_refuses_a_folder_that_another_is_writing_to(grafted, tmp_path):
    images = photographs(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with (
        filelock.FileLock(tmp_path / "out" / LOCK),
        pytest.raises(UnwritableOutputError, match="one that is locked.\nWait for the other run"),
    ):
        dinov2_attn.extract(build(grafted), images, tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == {LOCK}
    assert dinov2_attn.extract(build(grafted), images, tmp_path / "out").images == 12


@needs_signals
def test_a_killed_program_with_workers_frees_the_folder_at_once(first, tmp_path):
    """Its workers live a little longer than it, and hold nothing."""
    photographs(tmp_path / "in", 140)
    path = os.pathsep.join(map(str, [PACKAGE, *Path(first.module("dinov2").__path__[0]).parents]))
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": path, "COLUMNS": "80"}
    program = [sys.executable, "-m", "dinov2_attn", "extract", "in", "-o", "out"]
    program += ["--weights", DEMO, "--image-size", "28", "--shard-size", "20", "--workers", "2"]
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE}
    options |= {"stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(program, **options)
    first_shard = tmp_path / "out" / "shards" / "00000.jsonl"
    deadline = time.monotonic() + 100
    while not first_shard.exists() and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    running.send_signal(signal.SIGSTOP)
    refused = subprocess.run(program, check=False, timeout=120, **options)
    assert refused.returncode == 2, refused.stdout
    assert "one that is locked.\n  Wait for the other run" in refused.stdout
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    assert len(list(first_shard.parent.glob("*.jsonl"))) < 7  # stopped on its way
    with filelock.FileLock(tmp_path / "out" / LOCK, timeout=0):
        pass
    again = subprocess.run(program, check=False, timeout=120, **options)
    assert again.returncode == 0, again.stdout
    assert "140 images, 0 of them unreadable, in 7 shards" in again.stdout


FORKED = """
import os, signal
from dinov2_attn.apps.extraction.bar import Bar
Bar(total=1).close()
child = os.fork()
if not child:
    Bar.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
Bar(total=1).close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_that_is_killed_leaves_no_lock_of_the_bar():
    """That of tqdm is one for all forks, and the last line would wait for ever."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGE)])}
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
