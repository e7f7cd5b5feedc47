"""A model that runs some of its blocks: the error names them, and the call that records them."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from dinov2_attn import record
from dinov2_attn.errors import NotRecordedError
from tests.support.recordings import IMAGES, assert_nothing_on, build
from tests.support.tolerances import assert_close

CALL = re.compile(r"record\(model, (\[[\d, ]*\])\)")


class Chosen(nn.Module):
    """Runs the blocks it is told to, in that order; a list for each pass over the images."""

    def __init__(self, encoder, *passes, prepares=True):
        super().__init__()
        self.encoder, self.passes, self.prepares = encoder, passes, prepares

    def forward(self, images):
        tokens = self.encoder.prepare_tokens_with_masks(images)
        for i, blocks in enumerate(self.passes):
            if i and self.prepares:
                tokens = self.encoder.prepare_tokens_with_masks(images)
            for block in blocks:
                tokens = self.encoder.blocks[block](tokens)
        return tokens


def refused(model, n=None):
    """Record, and return the error."""
    with pytest.raises(NotRecordedError) as caught, record(model, n):
        model(IMAGES)
    assert_nothing_on(model)
    return caught.value


def follow(model, error):
    """Return the recordings of all calls that the error names, together."""
    calls = [eval(layers) for layers in CALL.findall(str(error))]
    with ExitStack() as stack:
        recordings = [stack.enter_context(record(model, layers)) for layers in calls]
        model(IMAGES)
    return dict(zip(map(tuple, calls), recordings, strict=True))


def weights_as_run(model):
    """Ask each attention module for what it is given, block by block, in the order of the pass."""
    seen, hooks = [], []
    for i, block in enumerate(model.encoder.blocks):
        hooks.append(
            block.attn.register_forward_pre_hook(
                lambda m, args, i=i: seen.append((i, m, args[0].clone()))
            )
        )
    with torch.no_grad():
        model(IMAGES)
    for hook in hooks:
        hook.remove()
    return [(i, module(tokens, return_attn=True)) for i, module, tokens in seen]


KINDS = {
    "early exit": ([[0, 1]], [[0, 1]], "blocks 0, 1 ran, block 2 did not"),
    "skipped": ([[0, 2]], [[0, 2]], "blocks 0, 2 ran, block 1 did not"),
    "one block": ([[1]], [[1]], "block 1 ran, blocks 0, 2 did not"),
    "two passes": ([[0, 1], [0, 2]], [[0], [1], [2]], "blocks 1, 2 not exactly once in each pass"),
    "apart": ([[0], [1, 2]], [[1, 2], [0]], "blocks 0, 1, 2 ran"),
    "whole and partial": ([[0, 1, 2], [0, 1]], [[0, 1], [2]], "1 of them, and 1 without"),
    "twice": ([[0, 1, 1, 2]], [[0, 2], [1]], "block 1 not exactly once in each pass"),
    "last twice": ([[0, 1, 2, 2]], [[0, 1], [2]], "block 2 not exactly once in each pass"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_that_ran_are_named_and_the_call_records_them(grafted, kind):
    passes, groups, said = KINDS[kind]
    model = Chosen(build(grafted), *passes)
    error = refused(model)
    assert said in str(error)
    found = follow(model, error)
    assert list(map(list, found)) == groups


@given(
    passes=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=3),
    prepares=st.booleans(),
    asked=st.none() | st.sets(st.integers(0, 3), min_size=1),
)
@example(passes=[[1], [1, 2]], prepares=True, asked={1, 2})
def test_following_records_every_run_of_every_block(grafted, passes, prepares, asked):
    """Whatever a model runs: either it is recorded, or the calls named record it."""
    model = Chosen(build(grafted, depth=4), *passes, prepares=prepares)
    n = None if asked is None else sorted(asked)
    try:
        with record(model, n):
            model(IMAGES)
        return
    except NotRecordedError as error:
        caught = error
    ran = weights_as_run(model)
    if not ran:
        assert "called from outside of their forward" in str(caught)
        return
    found = follow(model, caught)
    assert found
    for layers, maps in found.items():
        for place, layer in enumerate(layers):
            expected = [weights for i, weights in ran if i == layer]
            assert len(maps.passes) == len(expected) > 0
            for one, weights in zip(maps.passes, expected, strict=True):
                assert one.layers == layers
                assert_close(one.weights[place], weights)
    covered = {layer for layers in found for layer in layers}
    wanted = {i for i, _ in ran if n is None or i in n} or {i for i, _ in ran}
    assert covered == wanted or len(found) == 3


def test_layers_that_never_ran_lead_to_those_that_did(grafted):
    model = Chosen(build(grafted), [0, 1])
    error = refused(model, [2])
    assert "none of them ran, block 2 did not, blocks 0, 1 ran instead" in str(error)
    assert list(follow(model, error)) == [(0, 1)]


def test_many_ways_name_the_first(grafted):
    model = Chosen(build(grafted, depth=5), [0, 1, 2, 3], [0, 1, 2], [0, 1], [0])
    error = refused(model)
    assert " as maps_3, and so on for each other block. If" in str(error)
    assert " as maps, record(model, " in str(error)
    assert follow(model, error)


def test_layer_drop_in_training(grafted):
    torch.manual_seed(0)
    encoder = build(grafted)
    drawn = [[i for i in range(3) if torch.rand(()) > 0.5] for _ in range(6)]
    model = Chosen(encoder, *drawn).train()
    assert follow(model, refused(model))


def test_nothing_that_ran_says_where_to_run_it(grafted):
    model = Chosen(build(grafted), [])
    assert "called from outside of their forward" in str(refused(model))


def test_whole_passes_are_not_kept(grafted):
    """A long loop remembers nothing but passes that were partial, each kind once."""
    model = build(grafted)
    with record(model) as maps:
        for _ in range(3):
            model(IMAGES)
    assert len(maps.passes) == 3
    partial = Chosen(model, *[[0, 1]] * 50)
    assert "0 of them, and 50 without" in str(refused(partial))
    assert follow(partial, refused(partial))
