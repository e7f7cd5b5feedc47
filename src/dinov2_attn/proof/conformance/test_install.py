"""The code is recognised, grafted and restored."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import dinov2_attn
from dinov2_attn.backbone.structure import Role, name_of
from dinov2_attn.history.projects import PROJECTS
from dinov2_attn.proof.conformance.building import MODEL_CASES
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.tolerances import assert_same_bits

KEYWORDS = {
    Role.ATTENTION: "return_attn",
    Role.BLOCK: "return_attention",
    Role.CAUSAL_BLOCK: "return_attention",
    Role.TRANSFORMER: "return_attention",
}


def test_the_code_is_recognised_and_grafted(code: Code, refusal: str | None) -> None:
    """The only test that fails if the plugin rejects the code; the others are skipped."""
    if refusal is not None:
        pytest.fail(refusal, pytrace=False)
    with dinov2_attn.install(code.package):
        found: dict[Role, list[Any]] = dict(code.parts)
        left_out = dinov2_attn.status().left_out
        assert not (left_out and code.package in {project.package for project in PROJECTS}), (
            f"left out: {left_out}"
        )
        for part, classes in found.items():
            for cls in classes:
                if name_of(cls) in left_out:
                    continue
                assert KEYWORDS[part] in inspect.signature(cls.forward).parameters, cls
        for cls in code.classes(Role.TRANSFORMER):
            assert hasattr(cls, "get_self_attention"), cls
            assert hasattr(cls, "get_last_self_attention"), cls


def test_uninstall_restores_the_same_objects(ungrafted: Code) -> None:
    """Twice, with a second install inside the first."""
    classes = [cls for found in ungrafted.parts.values() for cls in found]
    before = [dict(vars(cls)) for cls in classes]
    for _ in range(2):
        with dinov2_attn.install(ungrafted.package), dinov2_attn.install(ungrafted.package):
            assert any(vars(c)["forward"] is not b["forward"] for c, b in _own(classes, before))
        for cls, was in zip(classes, before, strict=True):
            assert vars(cls).keys() == was.keys(), cls
            assert all(vars(cls)[name] is value for name, value in was.items()), cls


def test_install_draws_no_random_number(ungrafted: Code) -> None:
    """Not even for the modules that install builds to test the code."""
    state = torch.get_rng_state()
    with dinov2_attn.install(ungrafted.package):
        assert_same_bits(torch.get_rng_state(), state, "the state of the random generator")


def test_a_model_keeps_no_trace(ungrafted: Code, model_class: type) -> None:
    """Grafts are on classes. Instances, their parameters and names are unchanged."""
    model = MODEL_CASES[0].build(ungrafted, model_class)
    keys, attributes = list(model.state_dict()), set(vars(model))
    with dinov2_attn.install(ungrafted.package):
        assert list(model.state_dict()) == keys
        assert set(vars(model)) == attributes


def _own(
    classes: list[type], before: list[dict[str, object]]
) -> list[tuple[type, dict[str, object]]]:
    """Return the classes that define ``forward``."""
    return [(c, b) for c, b in zip(classes, before, strict=True) if "forward" in b]
