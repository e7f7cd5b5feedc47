"""DINOv3's revisions: which of them a copy is, and when it is said to have changed."""

from __future__ import annotations

import warnings

import pytest

import dinov2_attn
from dinov2_attn.errors import UpstreamDriftWarning
from dinov2_attn.history.projects import DINOV2, DINOV3, project_at, project_named, project_of
from tests.support import dinov3, upstreams


@pytest.fixture
def meta():
    """A checkout of DINOv3, one of the revisions that are known."""
    if not dinov3.CHECKOUT:
        pytest.skip("DINOV2_ATTN_DINOV3 names no checkout of DINOv3")
    dinov3.META.load()
    for name in dinov3.META.modules:
        __import__(name)
    return dinov3.META


def installed(package):
    """What status() says of ``package``, and the warnings of drift at install."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dinov2_attn.install(package):
            said = dinov2_attn.status().recognised[package]
    return said, [str(w.message) for w in caught if w.category is UpstreamDriftWarning]


def test_a_revision_is_named(meta):
    said, warned = installed("dinov3")
    assert said.startswith("attention and blocks as in 11c5863 … 6876159 (2025-08-14 … 2026-07-15)")
    assert said.count(" of dinov3, verified") == 2
    assert warned == []


def test_new_code_is_warned_of(meta, monkeypatch):
    cls = meta.module("layers.attention").SelfAttention
    monkeypatch.setattr(cls, "apply_rope", cls.compute_attention)
    _, (warned,) = installed("dinov3")
    assert warned.startswith("dinov3 is no revision of upstream that is known here. It is as in ")
    assert " but for SelfAttention.apply_rope. " in warned
    assert " verify " in warned


def test_a_copy_in_another_package_is_compared_and_never_warned_of(monkeypatch):
    copy = dinov3.LIGHTLY.load()
    module = copy.module("layers.attention")
    monkeypatch.setattr(module.SelfAttention, "apply_rope", module.SelfAttention.forward)
    said, warned = installed(copy.package)
    assert " of dinov3, verified" in said  # blocks; of the changed attention nothing is said
    assert warned == []


def test_the_project_of_classes_is_told_by_package_and_names():
    """Both projects have a class DinoVisionTransformer."""
    copy = dinov3.LIGHTLY.load()
    classes = [
        copy.module("layers.attention").SelfAttention,
        copy.module("models.vision_transformer").DinoVisionTransformer,
    ]
    assert project_of(classes) is DINOV3
    names = ("Attention", "Block", "DinoVisionTransformer")
    assert project_of([upstreams.DEPTH_ANYTHING.cls(name) for name in names]) is DINOV2


def test_the_project_of_a_revision_is_told_by_its_files():
    assert project_at({"dinov3/layers/attention.py": ""}.get) is DINOV3
    assert project_at({"dinov2/layers/attention.py": ""}.get) is DINOV2
    assert project_at({}.get) is DINOV2
    assert project_named("dinov3.layers") is DINOV3
    assert project_named("moge.model.dinov2") is DINOV2
