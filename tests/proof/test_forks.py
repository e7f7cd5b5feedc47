"""Copies that others vendor, by package and by live model: the table of docs/verify.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dinov2_attn
from tests.support import reference, upstreams
from tests.support.strategies import ModelCase, noise, randomise
from tests.support.tolerances import assert_close

CASE = ModelCase(
    depth=2, chunks=0, registers=2, heads=2, grid=(2, 3), batch=2, dtype=torch.float64, seed=1
)


def assert_last_is_right(model):
    expected = model.get_self_attention(CASE.images)[-1]
    caught = []
    last = [m for m in model.modules() if hasattr(m, "qkv")][-1]
    hook = last.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    model.forward_features(CASE.images)
    hook.remove()
    assert_close(expected, reference.weights(last, caught[-1]))


@pytest.mark.parametrize("copy", upstreams.WITH_MODELS, ids=str)
@pytest.mark.parametrize("how", ["package", "model"])
def test_a_model_returns_attention(copy, how):
    model = CASE.build(copy)
    with dinov2_attn.install(copy.package if how == "package" else model):
        assert_last_is_right(model)
    assert not hasattr(model, "get_self_attention")


@pytest.mark.parametrize("how", ["package", "model"])
def test_anomalibs_classes_return_attention(how):
    copy = upstreams.ANOMALIB
    block = copy.cls("Block")(12, num_heads=2, attn_class=copy.cls("MemEffAttention")).double()
    tokens = noise(2, 5, 12, seed=0, dtype=torch.float64)
    randomise(block, 0)
    with dinov2_attn.install(copy.package if how == "package" else block):
        weights = block(tokens, return_attention=True)
    assert_close(weights, reference.weights(block.attn, block.norm1(tokens)))


def test_the_table_of_copies_names_every_copy():
    page = Path(__file__).parents[2].joinpath("docs/verify.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and '`"' in line]
    for copy in upstreams.ALL[1:]:
        (row,) = [row for row in rows if f'`"{copy.package}"`' in row]
        assert copy.wheel.version in row
        assert "proven" in row
    fork = upstreams.DEPTH_ANYTHING_3.package
    assert any("proven at its kernel" in row and fork in row for row in rows)
