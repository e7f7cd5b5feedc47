"""Two ways to the weights: from the projection, and at the kernel. They agree on every copy."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.backbone.structure import attention_modules
from dinov2_attn.grafting.collector import collect, weights_at_kernel
from tests.support.recordings import IMAGES, build
from tests.support.strategies import model_cases
from tests.support.tolerances import assert_close

queries = st.sampled_from([None, "cls", 0, [0, -1], slice(None, None, 2), slice(1, None)])
heads = st.sampled_from([None, "mean"])


@given(case=model_cases(), queries=queries, heads=heads)
def test_the_kernel_and_the_projection_agree(models, case, queries, heads):
    model = case.build(models)
    selection = {"queries": queries, "heads": heads}
    from_projection = [
        model.get_self_attention(case.images, [layer], case.masks, **selection)[0]
        for layer in range(case.depth)
    ]
    attentions = list(attention_modules(model).values())
    run = partial(model, case.images, masks=case.masks)
    at_kernel = collect(run, attentions, case.depth, **selection)
    assert len(at_kernel) == case.depth
    for ours, theirs in zip(at_kernel, from_projection, strict=True):
        assert_close(ours, theirs)


@torch.no_grad()
def test_a_pass_at_the_kernel_ends_after_the_last_layer_that_is_needed(models):
    model = build(models)
    expected, ran = model.get_self_attention(IMAGES), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    attention = model.blocks[1].attn
    for expected_blocks in ([0, 1, 2], [0]):  # the first pass is whole, and proved
        ran.clear()
        weights = weights_at_kernel(lambda: model(IMAGES), model, [attention])
        assert_close(weights, expected[1])
        assert ran == expected_blocks
