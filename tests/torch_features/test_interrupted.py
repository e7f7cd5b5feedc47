"""``KeyboardInterrupt`` at any line of a call: see tests/programs/stopping.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs.stopping import CALLS
from tests.support.subprocesses import python

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left_that_the_next_call_does_not_heal(name):
    done = python("-W", "ignore", "-m", "tests.programs.stopping", name, 60, 0, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 interrupts" in done.stdout
