"""``plot`` of rollouts and relevance: the map, its unit and its words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_attn import viz
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.maps.relevance import Relevance
from dinov2_attn.maps.rollout import Rollout
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

GRID, PREFIX = (3, 4), 2
N = PREFIX + 12


def weights(rows=2, batch=2):
    return noise(batch, rows, N, seed=0).abs()


def relevance_of(**options):
    return Relevance(weights(), GRID, PREFIX, (0, 5), target=("class 3", "class 7"), **options)


def text_of(ax):
    return " ".join(" ".join(t.get_text() for t in ax.figure.texts).split())


def values_of(ax):
    return torch.as_tensor(np.asarray(ax.images[-1].get_array()))


def test_relevance_has_its_own_words_and_no_unit():
    found = relevance_of(method="gradient_rollout")
    ax = viz.plot(found, query=(0, 3), sample=1, name="a model", warning="CAREFUL")
    assert_close(values_of(ax), found.patch_maps()[1, 1])
    text = text_of(ax)
    assert "Relevance for class 7, by the method gradient_rollout (row of patch (0, 3))." in text
    assert "Model: a model." in text
    assert "CAREFUL" in text
    assert "uniform" not in text


def test_a_rollout_is_in_multiples_of_uniform_attention():
    found = Rollout(weights(), GRID, PREFIX, (0, 5))
    ax = viz.plot(found)
    assert_close(values_of(ax), found.patch_maps()[0, 0].double() * N)
    assert "Attention rollout of CLS." in text_of(ax)
    assert "uniform attention" in text_of(ax)


def test_legrad_has_one_row_for_all_tokens():
    found = Relevance(weights(1), GRID, PREFIX, None, method="legrad", target=("class 3",))
    assert "(mean of the rows of all tokens)" in text_of(viz.plot(found, sample=1))


def test_a_row_that_is_zero_says_so():
    found = Relevance(torch.zeros(1, 1, N), GRID, PREFIX, (0,), target=("class 3",))
    assert "zero everywhere: the target does not depend on this row" in text_of(viz.plot(found))


def test_arrays_and_pictures_below_are_drawn_too():
    found = relevance_of()
    image = np.zeros((42, 56, 3), np.uint8)
    ax = viz.plot(found.numpy(), image=image, outline=np.ones((42, 56), bool))
    assert len(ax.images) == 2
    assert_same_bits(values_of(ax), values_of(viz.plot(found)))


@pytest.mark.parametrize("given", [{"layer": 1}, {"head": 0}, {"artifacts": object()}])
def test_what_a_map_of_all_layers_has_not_is_refused(given):
    with pytest.raises(InvalidInputError, match=next(iter(given))):
        viz.plot(relevance_of(), **given)


@pytest.mark.parametrize("given", [{"query": (1, 1)}, {"sample": 2}])
def test_what_is_not_there_is_refused(given):
    with pytest.raises(OutOfRangeError):
        viz.plot(relevance_of(), **given)
