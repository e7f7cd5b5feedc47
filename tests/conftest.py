"""Fixtures: real upstream code, grafted for a module's tests."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import Phase, settings

import dinov2_attn
from dinov2_attn.history import eras
from dinov2_attn.history.projects import DINOV2
from tests.support import upstreams
from tests.support import xformers_visibility as xformers
from tests.support.installing import installed, uninstalled
from tests.support.markers import markers_of

# Upstream decides at import. Most tests run as on a machine without xFormers, where a CPU can
# compare with ungrafted upstream; those of `nested` see the real one (test_nested and others).
xformers.hide()

# "ci" repeats itself, so that a landing is never held up by a newly drawn example; a search for
# new ones is `pytest --hypothesis-profile=thorough`. "mutants" is for `tools/mutate`: a test
# only has to fail there.
settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.register_profile(
    "mutants",
    deadline=None,
    max_examples=8,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Tensors here are tiny: a second thread would only wait for the first. `.ci/processors` asks for
# more. Processes that tests start take as many.
os.environ["OMP_NUM_THREADS"] = os.environ.get("DINOV2_ATTN_TEST_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """Give tests the markers of tests/support/markers.py."""
    for item in items:
        for marker in markers_of(item.nodeid.removeprefix("tests/")):
            item.add_marker(marker)


@pytest.fixture(scope="session", autouse=True)
def _loaded():
    """Every copy of the code importable, none imported, nothing installed."""
    for upstream in (*upstreams.ALL, upstreams.DEPTH_ANYTHING_3):
        upstream.load()


@pytest.fixture(autouse=True)
def _leaves_no_graft():
    """A test leaves what was installed before it: another one would see its grafts."""
    before = installed()
    yield
    assert installed() == before


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


@pytest.fixture(scope="module", params=upstreams.WITH_MODELS, ids=str)
def nested(request):
    """A copy of the code imported with real xFormers, and grafted."""
    upstream = request.param
    with xformers.visible(), upstream.imported_anew():
        for module in (upstream.attention, upstream.block, upstream.model):
            upstream.module(module)
        with dinov2_attn.install(upstream.package):
            yield upstream


@pytest.fixture(scope="module")
def grafted():
    """Upstream itself, grafted: for what is slow and asks the same of every copy."""
    with dinov2_attn.install(upstreams.FIRST.package):
        yield upstreams.FIRST


@pytest.fixture
def first():
    """Upstream itself, not installed. Fixtures of the module may have installed other copies."""
    with uninstalled():
        yield upstreams.FIRST


@pytest.fixture
def first_is_newest(monkeypatch):
    """The table of eras as it was when PyPI's commit was the newest: drift is judged by that."""
    oldest = eras.table()[:1]
    monkeypatch.setattr(eras, "table", lambda project=DINOV2: oldest)


@pytest.fixture
def with_registers(monkeypatch):
    """A fork with registers in the place of upstream's first revision, which has none."""
    upstreams.FIRST.module(upstreams.FIRST.model)
    fork = upstreams.DEPTH_ANYTHING.module("depth_anything_v2.dinov2")
    monkeypatch.setattr(sys.modules["dinov2.models"], "vision_transformer", fork)


@pytest.fixture
def fresh_dynamo():
    """Dynamo without graphs of other tests: it counts them for each code object."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
