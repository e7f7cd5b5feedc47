"""Which layers a recording takes, and what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov2_attn.errors import OutOfRangeError
from dinov2_attn.maps.layers import has_paths, kind_of, recorded_in, some_of
from tests.maps.test_gradients import of_fork, of_upstream


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1, 2, 3], "0, 1, 2, 3"),
        (["a", "b", "c", "d", "e"], "a, b, …, e"),
        (range(12), "0, 1, …, 11"),
    ],
)
def test_of_many_layers_a_message_names_the_first_two_and_the_last(names, said):
    assert some_of(names) == said


def test_layers_of_a_kind_differ_in_their_numbers_only():
    assert kind_of("encoder.layer.11.attention") == kind_of("encoder.layer.0.attention")
    assert kind_of("a.1.attn") != kind_of("b.1.attn")
    assert kind_of(3) == kind_of(11) == ""


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("blocks.0.attn", True),
        ([3, "blocks.0.attn"], True),
        (("a", "b"), True),
        ([3, 4], False),
        ([], False),
        (3, False),
        (None, False),
        (torch.tensor([1]), False),
    ],
)
def test_paths_are_told_from_numbers(layers, expected):
    assert has_paths(layers) is expected


@pytest.mark.parametrize("models", [of_upstream, of_fork])
def test_wrappers_of_pytorch_are_not_the_model(models):
    model, _ = models()
    for wrapped in (model, nn.Sequential(model), nn.Sequential(nn.DataParallel(model))):
        found = recorded_in(wrapped, None)
        assert found.whole is model
        assert found.is_backbone
        assert list(found.wanted.values()) == [0, 1, 2]
    beside = nn.Sequential(model, nn.Identity())
    found = recorded_in(beside, [0, -1])
    assert found.whole is beside
    assert not found.is_backbone
    assert list(found.wanted.values()) == [0, 2]
    assert list(found.others.values()) == [1]
    assert found.count == 2


def test_paths_and_places_name_the_same_layers():
    model, _ = of_fork()
    twice = nn.ModuleDict({"first": model, "second": of_fork()[0]})
    paths = [name for name, _ in twice.named_modules() if name.endswith("attn")]
    assert list(recorded_in(twice, None).all.values()) == paths
    assert list(recorded_in(twice, [0, -1, paths[4]]).wanted.values()) == [paths[0], *paths[4:]]
    assert list(recorded_in(twice, 2).wanted.values()) == paths[-2:]
    assert list(recorded_in(twice, paths[1]).wanted.values()) == paths[1:2]
    with pytest.raises(OutOfRangeError, match="Did you mean 'second.blocks.2.attn'?"):
        recorded_in(twice, ["second.block.2.attn"])
    assert list(recorded_in(model, ["blocks.1.attn"]).wanted.values()) == ["blocks.1.attn"]
