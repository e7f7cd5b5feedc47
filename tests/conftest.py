"""Fixtures: real upstream code, grafted for a module's tests."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import settings

import dinov2_attn
import upstreams

# Where xFormers is installed, upstream calls its kernel, and there is none for the CPU. Its branch
# is proved at install over a plain kernel; everything else runs as it does without xFormers.
sys.modules["xformers"] = None

# "ci" repeats itself, so that a landing is never held up by a newly drawn example; a search for
# new ones is `pytest --hypothesis-profile=thorough`.
settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Tensors here are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _loaded():
    """Every copy of the code importable, none imported, nothing installed."""
    for upstream in (*upstreams.ALL, upstreams.DEPTH_ANYTHING_3):
        upstream.load()


@pytest.fixture(scope="module", params=upstreams.ALL, ids=str)
def layers(request):
    """A copy of the code whose attention modules and blocks are grafted."""
    with dinov2_attn.install(request.param.package):
        yield request.param


@pytest.fixture(scope="module", params=upstreams.WITH_MODELS, ids=str)
def models(request):
    """A copy of the code whose vision transformer is grafted."""
    with dinov2_attn.install(request.param.package):
        yield request.param


@pytest.fixture
def first():
    """Upstream itself, not installed."""
    dinov2_attn.uninstall()
    yield upstreams.FIRST
    dinov2_attn.uninstall()
