"""A pytest plugin that `tools/mutate` loads: it tells mutmut of calls that mutmut cannot see.

mutmut runs for a mutant the tests that called its function. Fixtures of a module call some
functions once for all its tests, and fresh or forked processes call others. It forks from a
process that has run tests, so what they found out about classes is forgotten.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

GRAFTING_FIXTURES = {"layers", "models", "nested", "grafted"}

# Called once for all tests of a module. Each of its tests calls the functions that they return.
CALLED_FOR_ALL = {
    "dinov2_attn.grafting.channel.x_graft_captured",
    "dinov2_attn.grafting.channel.x_graft_given_images",
    "dinov2_attn.grafting.modules.x_graft_attention",
    "dinov2_attn.grafting.modules.x_graft_block",
    "dinov2_attn.grafting.modules.x_graft_block_at_kernel",
    "dinov2_attn.grafting.models.x_graft_forward",
    "dinov2_attn.grafting.models.x_graft_forward_features",
}

# Called after a fork, in the child.
CALLED_AFTER_FORK = {
    "dinov2_attn.grafting.channel.x__forget_other_threads",
    "dinov2_attn.grafting.channel.xǁ_Activeǁleave_others",
}


# What tests of a file call in processes that they start or fork.
CALLED_ELSEWHERE = {
    "test_watching.py": {"dinov2_attn.backbone.watching.x__forget_other_threads"},
}


def _called_in_fresh_processes() -> set[str]:
    """Return what tests/apps/weights/test_source.py calls in processes of its own."""
    from dinov2_attn.apps.weights import source

    return {
        f"{source.__name__}.x_{name}"
        for name, function in vars(source).items()
        if getattr(function, "__module__", "") == source.__name__
    }


def pytest_sessionstart() -> None:
    """Let a mutant find out itself which classes name a kernel."""
    from dinov2_attn.backbone import structure

    structure._NAMING.clear()


def pytest_runtest_setup(item: pytest.Function) -> None:
    """Count these calls for each test while mutmut records who calls what."""
    if os.environ.get("MUTANT_UNDER_TEST") != "stats":
        return
    from mutmut.stats import record_trampoline_hit

    called = set(CALLED_FOR_ALL) if GRAFTING_FIXTURES & set(item.fixturenames) else set()
    called |= CALLED_ELSEWHERE.get(item.path.name, set())
    if item.path.name == "test_source.py":
        called |= _called_in_fresh_processes()
    if item.path.name == "test_invisible.py":
        called |= CALLED_AFTER_FORK
    for name in called:
        record_trampoline_hit(name)
