"""The patches for forks: a second implementation, equal to the grafts.

A patched tree without the plugin returns what the unpatched tree returns with it. Outputs are
equal bit for bit, weights and gradients up to rounding. patched_tree_runner.py runs each tree in a
process of its own.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from dinov2_attn._download import fetch_wheel
from tests.programs import patched_tree_runner
from tests.support.subprocesses import python
from tests.support.tolerances import assert_close, assert_same_bits
from tests.support.upstreams import FIRST

ROOT = Path(__file__).parents[2]
PATCHES = sorted(ROOT.glob("patches/*.patch"))
FIRST_PATCH = ROOT / "patches" / "dinov2+fc49f49..be7e572.patch"
NAME = re.compile(r"dinov2\+(?P<first>\w{7})\.\.(?P<last>\w{7})\.patch")

# A URL or a path: where upstream's whole history is.
HISTORY = os.environ.get("DINOV2_ATTN_HISTORY", "https://github.com/facebookresearch/dinov2")
TOUCHED = ("layers/attention.py", "layers/block.py", "models/vision_transformer.py")

each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)


class GitError(Exception):
    """The error of a git command."""


def git(*arguments, timeout=60, **options):
    """Run git and return its output as bytes. Git never asks for a password."""
    command = ["git", *map(str, arguments)]
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **options.pop("env", {})}
    done = subprocess.run(
        command, capture_output=True, check=False, timeout=timeout, env=env, **options
    )
    if done.returncode != 0:
        raise GitError(done.stderr.decode())
    return done.stdout


def apply(patch, tree):
    # Without the ceiling, git would skip every file if the folder is inside a repository.
    git("apply", patch, cwd=tree, env={"GIT_CEILING_DIRECTORIES": str(tree.parent)})


def unpack(archive, tree):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tree)
    return tree


def assert_same(pristine, patched, folder):
    """Compare the pristine tree with the plugin to the patched one without."""
    grafts, patch = answers(pristine, "plugin", folder), answers(patched, "patched", folder)
    assert grafts.keys() == patch.keys()
    for name, expected in grafts.items():
        is_upstreams = "/dict.features" in name or not expected.is_floating_point()
        if is_upstreams:
            assert_same_bits(patch[name], expected, name)
            continue
        # The gradients of weights and of features meet before the projection in one of two
        # implementations, and behind it in the other. Autocast rounds them there.
        is_rounded = name.startswith("autocast") and "gradients" in name
        dtype = torch.bfloat16 if is_rounded else None
        assert_close(patch[name], expected, name, dtype=dtype)


def answers(tree, way, folder):
    result = folder / f"{way}.pt"
    done = python("-W", "ignore", patched_tree_runner.__file__, tree, way, result, cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(result, weights_only=True)


# From PyPI


def test_the_first_patch_equals_the_grafts_on_pypis_first_commit(tmp_path):
    wheel = fetch_wheel(FIRST.wheel)
    pristine, patched = (unpack(wheel, tmp_path / name) for name in ("pristine", "patched"))
    apply(FIRST_PATCH, patched)
    assert_same(pristine, patched, tmp_path)


@each_patch
def test_the_header_states_the_purpose_of_the_patch(patch):
    named = NAME.fullmatch(patch.name)
    header, _, body = patch.read_text().partition("\n\n")
    values = dict(line.split(": ", 1) for line in header.splitlines())
    assert list(values) == ["Description", "Applies-To", "Forwarded", "Last-Verified"]
    assert f" {named['first']}..{named['last']} (" in values["Applies-To"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", values["Last-Verified"])
    assert body.startswith("diff --git ")


def test_the_wheel_ships_no_patches():
    config = (ROOT / "pyproject.toml").read_text()
    assert '[tool.hatch.build.targets.wheel]\npackages = ["src/dinov2_attn"]\n\n' in config
    assert not list((ROOT / "src").rglob("*.patch"))


# From upstream's whole history


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A bare clone of upstream."""
    folder = tmp_path_factory.mktemp("history")
    try:
        git("ls-remote", "--exit-code", HISTORY, "HEAD", timeout=10)
        git("clone", "--quiet", "--bare", "--single-branch", HISTORY, folder, timeout=300)
    except (GitError, subprocess.TimeoutExpired) as error:
        reason = str(error).splitlines()[0]
        pytest.skip(
            f"no history of upstream at {HISTORY} ({reason}): only the first patch runs, on PyPI's "
            "copy of the first commit. DINOV2_ATTN_HISTORY can name another address"
        )
    return folder


def commits(history, patch):
    """The commits of the patch's range, both ends included, the oldest first."""
    first, last = NAME.fullmatch(patch.name).groups()
    revisions = (last, "--not", f"{first}^@")
    return git("--git-dir", history, "rev-list", "--reverse", *revisions).decode().split()


def code_of(history, commit):
    """Return git's hashes of the three files."""
    revisions = [f"{commit}:dinov2/{file}" for file in TOUCHED]
    return git("--git-dir", history, "rev-parse", *revisions)


def check_out(history, commit, tree):
    archive = git("--git-dir", history, "archive", "--format=zip", commit, "dinov2")
    return unpack(io.BytesIO(archive), tree)


def test_the_patches_cover_the_history(history):
    covered = [commit for patch in PATCHES for commit in commits(history, patch)]
    assert len(covered) == len(set(covered)) == 50
    assert set(covered) == set(git("--git-dir", history, "rev-list", "7764ea0").decode().split())


@each_patch
def test_the_patch_applies_to_every_commit_of_its_range(history, patch, tmp_path):
    every = commits(history, patch)
    assert f"({len(every)} commits, " in patch.read_text()
    for commit in every:
        apply(patch, check_out(history, commit, tmp_path / commit))


@each_patch
def test_the_patch_equals_the_grafts_on_every_commit_of_its_range(history, patch, tmp_path):
    # Commits that do not change the three files need no comparison of their own.
    different = {code_of(history, commit): commit for commit in commits(history, patch)}
    for commit in different.values():
        folder = tmp_path / commit
        trees = [check_out(history, commit, folder / name) for name in ("pristine", "patched")]
        apply(patch, trees[1])
        assert_same(*trees, folder)
