"""What is recorded is kept on the device that is asked for.

Copies from a GPU that run beside the pass are tested in tests/kernels/test_cuda.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import InvalidInputError
from tests.maps.test_gradients import of_upstream, target
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.tolerances import assert_same_bits
from tests.support.xformers_visibility import quiet

EVERYTHING = {"facets": ("key", "value"), "statistics": ("entropy", "received")}
META = torch.device("meta")


def tensors_of(maps):
    named = [*maps.facets.values(), *maps.statistics.values.values()]
    return [*maps.weights, *(one for layers in named for one in layers)]


@pytest.mark.parametrize("device", ["meta", META])
@torch.no_grad()
def test_everything_is_on_the_device(models, device):
    model = build(models)
    plain = model(IMAGES)
    with record(model, **EVERYTHING) as expected:
        model(IMAGES)
    with record(model, device=device, dtype=torch.float16, **EVERYTHING) as maps:
        assert_same_bits(model(IMAGES), plain)
    assert all(one.device == META for one in tensors_of(maps))
    assert [one.shape for one in tensors_of(maps)] == [one.shape for one in tensors_of(expected)]
    assert {one.dtype for one in maps.weights} == {torch.float16}
    assert (maps.grid, maps.prefix) == (expected.grid, expected.prefix)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
@pytest.mark.parametrize("grad", [True, False])
def test_on_the_device_of_the_model_nothing_changes(models, device, grad):
    model = build(models)
    with torch.set_grad_enabled(grad):
        with record(model, **EVERYTHING) as expected:
            model(IMAGES)
        with record(model, device=device, **EVERYTHING) as maps:
            model(IMAGES)
    assert_same_bits(tensors_of(maps), tensors_of(expected))
    assert [w.requires_grad for w in maps.weights] == [w.requires_grad for w in expected.weights]


@torch.no_grad()
def test_what_reduce_returns_is_moved_and_what_it_is_given_is_not(first):
    model, seen = build(first), []

    def reduce(layer, weights):
        seen.append(weights.device.type)
        return {"layer": layer, "rows": [weights[:, :, 0], (weights.sum(),)]}

    with record(model, device="meta", reduce=reduce) as maps:
        model(IMAGES)
    assert set(seen) == {"cpu"}
    for layer, kept in enumerate(maps.weights):
        row, (total,) = kept["rows"]
        assert kept["layer"] == layer
        assert row.device == total.device == META


@pytest.mark.parametrize("reduce", [None, lambda _, weights: weights.mean(1)])
def test_gradients_are_where_the_weights_are(reduce):
    model, images = of_upstream()
    with record(model, gradients=True, device="meta", reduce=reduce) as maps:
        output = model(images)
    target(output).backward()
    for gradient, weights in zip(maps.gradients, maps.weights, strict=True):
        assert gradient.device == weights.device == META
        assert gradient.shape == weights.shape


@quiet
@torch.no_grad()
def test_each_batch_of_a_list_is_moved(nested):
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model, shapes = build(nested, block_fn=block), []
    for device in ("cpu", "meta"):
        with dinov2_attn.install(model), record(model, device=device) as maps:
            tokens = [model.prepare_tokens_with_masks(x) for x in (IMAGES, IMAGES[:1, ..., :2])]
            for one in model.blocks:
                tokens = one(tokens)
        assert {w.device.type for one in maps for w in one.weights} == {device}
        shapes.append([[w.shape for w in one.weights] for one in maps])
    assert shapes[0] == shapes[1]


@torch.no_grad()
def test_a_pass_from_its_weights_goes_on_where_it_was(models):
    model = build(models)
    with record(model, features="from_weights") as expected:
        plain = model(IMAGES)
    with record(model, features="from_weights", device="meta") as maps:
        output = model(IMAGES)
    assert_all_close([output], [plain])
    assert {w.device for w in maps.weights} == {META}
    assert [w.shape for w in maps.weights] == [w.shape for w in expected.weights]


@pytest.mark.parametrize(
    "wrong", ["gpu", "cuda:99", 99, 1.5, {}, "", "cpu\x1b[31m", ["cpu"]], ids=repr
)
def test_devices_that_are_not_there_are_refused(first, wrong):
    model = build(first)
    with (
        pytest.raises(InvalidInputError, match="device as one") as caught,
        record(model, device=wrong),
    ):
        pass
    assert "\x1b" not in str(caught.value)
    assert "_dinov2_attn" not in repr(vars(model))
