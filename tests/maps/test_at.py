"""One layer of maps by its name, and the map of one token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_attn.errors import InvalidInputError, NotRecordedError, OutOfRangeError
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.recording import Recording
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

GRID, PREFIX, N = (2, 3), 3, 9


def maps_of(*layers, **options):
    weights = tuple(noise(2, 4, N, N, seed=i).softmax(-1) for i in range(len(layers)))
    return AttentionMaps(weights, layers, GRID, PREFIX, **options)


def test_layers_go_by_their_numbers():
    maps = maps_of(0, 5, 11)
    assert len(maps) == 3
    assert all(one is other for one, other in zip(maps, maps.weights, strict=True))
    for layer, place in ((0, 0), (5, 1), (11, 2), (-1, 2), (-3, 0), (torch.tensor(5), 1)):
        assert maps[layer] is maps.weights[place]
    for wrong in (1, -4, "blocks.0.attn"):
        with pytest.raises(OutOfRangeError, match="one of the layers 0, 5, 11"):
            maps[wrong]
    with pytest.raises(InvalidInputError, match="layers as whole numbers"):
        maps[0.5]


def test_layers_go_by_their_paths_or_places():
    maps = maps_of("a.attn", "b.attn")
    assert maps["b.attn"] is maps[1]
    assert maps[-1] is maps[1]
    with pytest.raises(OutOfRangeError, match="one of the layers a.attn, b.attn"):
        maps[2]


@pytest.mark.parametrize(
    ("query", "position"), [("cls", 0), ("register:2", 2), ((1, 2), 8), (4, 4), ("0,1", 4)]
)
def test_the_map_of_one_token(query, position):
    maps = maps_of(0, 5)
    for sample in (0, 1):
        row = maps.weights[1][sample, :, position, PREFIX:].reshape(4, *GRID)
        assert_same_bits(maps.at(5, 3, query, sample=sample), row[3])
        assert_close(maps.at(query=query, sample=sample), row.mean(0), within=1e-7)
        array = maps.numpy().at(5, 3, query, sample=sample)
        assert isinstance(array, np.ndarray)
        assert_same_bits(torch.from_numpy(array), row[3])


def test_the_map_of_a_recorded_row_and_of_the_mean():
    whole = maps_of(0)
    mean = AttentionMaps((whole[0].mean(1)[:, [0, 4]],), (0,), GRID, PREFIX, (0, 4))
    assert_same_bits(mean.at(query=(0, 1)), whole[0].mean(1)[0, 4, PREFIX:].reshape(GRID))
    with pytest.raises(OutOfRangeError, match=r"rows: CLS, patch \(0, 1\)"):
        mean.at(query=(0, 0))
    with pytest.raises(OutOfRangeError, match="a head among mean"):
        mean.at(head=1)


def test_tokens_behind_the_patches_are_left_out():
    weights = noise(1, 2, 9, 9, seed=1)
    maps = AttentionMaps((weights,), (0,), GRID, 1, suffix=2)
    assert_same_bits(maps.at(0, 1), weights[0, 1, 0, 1:7].reshape(GRID))


def test_maps_without_cls_have_patches_only():
    maps = AttentionMaps((noise(1, 2, 6, 6, seed=1),), (0,), GRID, 0)
    assert_same_bits(maps.at(0, 1, (0, 0)), maps[0][0, 1, 0].reshape(GRID))
    with pytest.raises(OutOfRangeError, match="of a model without CLS"):
        maps.at()


def test_gradients_flow():
    weights = noise(1, 2, 9, 9, seed=1).requires_grad_()
    AttentionMaps((weights,), (0,), GRID, PREFIX).at(0, 1).sum().backward()
    assert int((weights.grad != 0).sum()) == 6


def test_a_recording_of_one_pass_answers_for_it():
    recording, maps = Recording(), maps_of(0, 5)
    recording.add(maps, None)
    for sample in (0, 1):
        expected = maps.at(0, 1, (1, 1), sample=sample)
        assert_same_bits(recording.at(0, 1, (1, 1), sample=sample), expected)


ASKED = {
    "at": lambda maps: maps.at(),
    "patch_maps": lambda maps: maps.patch_maps(),
    "prefix_mass": lambda maps: maps.prefix_mass(),
    "facets": lambda maps: (maps.facets, maps.facet("key"), maps.facet_maps("key")),
    "to": lambda maps: maps.to("cpu"),
    "cpu": lambda maps: maps.cpu(),
    "numpy": lambda maps: maps.numpy(),
    "save": lambda maps: maps.save("nowhere"),
    **{
        name: lambda maps, name=name: getattr(maps, name)
        for name in [
            "weights",
            "gradients",
            "statistics",
            "layers",
            "numbers",
            "sources",
            "grid",
            "prefix",
            "suffix",
            "per_cell",
            "planes",
            "queries",
        ]
    },
}


@pytest.mark.parametrize("name", ASKED)
def test_a_recording_of_several_passes_says_what_it_cannot_answer(name):
    recording = Recording()
    for _ in range(2):
        recording.add(maps_of(0), None)
    with pytest.raises(NotRecordedError, match=rf"whose {name} that is\.\nFound 2"):
        ASKED[name](recording)
    for ask in (recording.facet, recording.facet_maps):
        with pytest.raises(NotRecordedError, match="whose facets that is"):
            ask("key")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"head": 4}, "a head among 0, 1, 2, 3, or 'mean'"),
        ({"head": "max"}, "a head among"),
        ({"sample": 2}, "an image from 0 to 1"),
        ({"query": "register:3"}, "a register from 1 to 2"),
        ({"layer": 7}, "one of the layers 0"),
    ],
)
def test_what_is_not_there(asked, message):
    with pytest.raises(OutOfRangeError, match=message):
        maps_of(0).at(**asked)


@pytest.mark.parametrize("head", [0.5, True])
def test_a_head_is_a_whole_number(head):
    with pytest.raises(InvalidInputError, match="Expected heads as whole numbers"):
        maps_of(0).at(head=head)


def test_reduced_weights_have_no_rows():
    maps = AttentionMaps((torch.ones(3),), (0,), GRID, PREFIX)
    with pytest.raises(InvalidInputError, match=r"maps\[layer\]"):
        maps.at()
    with pytest.raises(InvalidInputError, match="whose patch grid is known"):
        AttentionMaps((torch.ones(1, 1, 9, 9),), (0,), None, 0).at()
