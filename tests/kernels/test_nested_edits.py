"""Edits of nested lists of xFormers: those of each element alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dinov2_attn import edit, record
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, same_bits
from tests.support.xformers_visibility import quiet


@quiet
@pytest.mark.parametrize("kind", ["heads", "keys", "rows", "weights"])
def test_nested_lists_of_xformers_are_edited_element_by_element(nested, kind):
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model = build(nested, block_fn=block)
    images = [IMAGES, noise(1, 3, 4, 4, seed=3, dtype=torch.float64)]
    arguments = {
        "heads": {"heads": {1: [1]}},
        "keys": {"keys": [1, 2]},
        "rows": {"keys": "patches", "queries": "cls"},
        "weights": {"weights": lambda _, weights: weights.flip(1), "queries": [0, 3]},
    }[kind]

    def run(batches):
        tokens = [model.prepare_tokens_with_masks(batch) for batch in batches]
        for block in model.blocks:
            tokens = block(tokens)
        return tokens

    plain = run(images)
    with edit(model, **arguments), record(model, check="every") as maps:
        together = run(images)
    assert len(maps.passes) == 2
    for i, batch in enumerate(images):
        with edit(model, **arguments), record(model) as alone:
            (tokens,) = run([batch])
        assert_close(together[i], tokens)
        assert_all_close(maps.passes[i].weights, alone.weights)
        assert not same_bits(tokens, plain[i])
