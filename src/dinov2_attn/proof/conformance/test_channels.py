"""Channel-adaptive models: the attention of a channel does not depend on the others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import dinov2_attn
from dinov2_attn.backbone.contract import options_of
from dinov2_attn.proof.conformance.building import ModelCase, noise
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.test_agreement import calls_of_attention, reference_of
from dinov2_attn.proof.conformance.tolerances import assert_close

CASES = (
    ModelCase(grid=(2, 3)),
    ModelCase(depth=4, chunks=2, registers=2, grid=(3, 1), batch=3, seed=1),
)
CHANNELS = 5


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> ModelCase:
    """Return the sizes of a model."""
    found: ModelCase = request.param
    return found


@pytest.fixture
def model(grafted: Code, model_class: type, case: ModelCase) -> Any:
    """Return a model that processes each channel separately."""
    if "channel_adaptive" not in options_of(model_class):
        pytest.skip("this model is not channel-adaptive")
    return case.build(grafted, model_class, in_chans=1, channel_adaptive=True)


@pytest.fixture
def images(case: ModelCase) -> Tensor:
    """Return images with several channels."""
    return noise(case.batch, CHANNELS, *case.images.shape[2:], seed=case.seed)


def test_weights_are_those_of_get_intermediate_layers(
    model: Any, images: Tensor, case: ModelCase
) -> None:
    """Channels are in the batch dimension, as in that method."""
    calls = calls_of_attention(model, lambda: model.get_intermediate_layers(images, case.depth))
    answers = model.get_self_attention(images)
    assert len(answers) == len(calls) == case.depth
    for answer, call in zip(answers, calls, strict=True):
        assert_close(answer, reference_of(call), "weights = those of get_intermediate_layers")


def test_a_channel_of_many_is_the_channel_alone(model: Any, images: Tensor) -> None:
    """Channel c of image b is entry b · C + c of the batch, in every function."""
    with dinov2_attn.record(model) as recording:
        model.get_intermediate_layers(images, 1)
    asked = {
        "get_last_self_attention": model.get_last_self_attention(images),
        "get_self_attention": model.get_self_attention(images)[-1],
        "attention_maps": dinov2_attn.attention_maps(model, images).weights[-1],
        "forward_features": model.forward_features(images, return_attention=True)["attentions"][-1],
        "forward": model(images, return_attention=True)[1][-1],
        "record": recording.weights[-1],
    }
    for b, image in enumerate(images):
        for c, channel in enumerate(image):
            alone = model.get_last_self_attention(channel[None, None])
            for name, weights in asked.items():
                place = b * CHANNELS + c
                assert_close(weights[place, None], alone, f"channel {c} by {name} = alone")
