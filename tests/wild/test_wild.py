"""Models of other projects: what is answered is what their kernels were given, or it is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.support import subprocesses
from tests.wild.sources import MIRRORS, default_cache
from tests.wild.targets import ALL, ON_GITHUB, ON_PYPI

ROOT = Path(__file__).parents[2]
CLONES = os.environ.get(MIRRORS)
# What projects of today need: some wheels are not for older ones.
IS_OLD = sys.version_info < (3, 11) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)

# A target that is answered has to leave this list. The kernel of this one is called by the task
# model, from outside of the attention modules.
REFUSED = {"lightly-eomt"}


def report_on(target):
    where = [f"--cache={default_cache()}", *([f"--mirrors={CLONES}"] if CLONES else [])]
    done = subprocesses.python("-m", "tests.wild.run", target.name, *where, cwd=ROOT)
    assert not done.returncode, done.stderr
    report = json.loads(done.stdout)
    if IS_OLD and report["verdict"].startswith("cannot be built here"):
        pytest.skip(f"{report['verdict']}: newer Python and PyTorch run it")
    assert report["calls"], report["verdict"]
    assert report["features_identical"] is not False, report["verdict"]
    return report


@pytest.mark.parametrize("target", ON_PYPI, ids=lambda target: target.name)
def test_a_model_from_pypi_is_answered_rightly_or_refused(target):
    verdict = report_on(target)["verdict"]
    assert verdict.startswith("refused: " if target.name in REFUSED else "equal to "), verdict


@pytest.mark.skipif(not CLONES, reason=f"{MIRRORS} names no clones: the targets of PyPI run")
@pytest.mark.parametrize("target", ON_GITHUB, ids=lambda target: target.name)
def test_a_model_from_github_is_answered_rightly_or_refused(target):
    verdict = report_on(target)["verdict"]
    # Rein attends to learned tokens by a function of its own, between the blocks of its DINOv2.
    known = ("refused: ", "equal to ", *(["in part: "] if target.name == "rein" else []))
    assert verdict.startswith(known), verdict


def test_names_of_targets_are_unique():
    names = [target.name for target in ALL]
    assert len(set(names)) == len(names)
    assert {*names} >= REFUSED
