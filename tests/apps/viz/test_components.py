"""Principal components of facets, against NumPy's singular values, and as a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_attn import record, relevance
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.components import principal_components
from tests.maps.test_gradients import of_fork
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

viz = pytest.importorskip("dinov2_attn.viz")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (1, 5, 2, 2), (3, 2, 4, 5)])
def test_components_are_those_of_the_singular_values(shape):
    features = noise(*shape, seed=1).double() * torch.arange(1, shape[1] + 1)[:, None, None]
    found = principal_components(features)
    rows = features.movedim(1, -1).reshape(-1, shape[1]).numpy()
    rows = rows - rows.mean(0)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    expected = (left * values)[:, :3]
    ours = found.movedim(1, -1).reshape(-1, 3).numpy()
    count = expected.shape[1]
    signs = np.sign((ours[:, :count] * expected).sum(0))
    assert_close(ours[:, :count], expected * signs, within=1e-10)
    assert not ours[:, count:].any()
    assert_close(principal_components(-features), -found, within=1e-9)


@pytest.fixture
def maps():
    model, images = of_fork()
    with torch.no_grad(), record(model, facets=("key", "value")) as recording:
        model(images)
    return recording


def shown(figure):
    return [axes.images[0].get_array() for axes in figure.axes]


def test_each_image_has_a_picture_with_shared_colours(maps):
    first, second = shown(viz.pca(maps))
    assert first.shape == second.shape == (2, 3, 3)
    assert np.stack([first, second]).min() == 0
    assert np.stack([first, second]).max() == 1
    components = principal_components(maps.facet_maps("key")[-1])
    assert int(first[..., 0].argmax()) == int(components[0, 0].argmax())


def test_layer_and_facet_are_chosen(maps):
    drawn = [
        shown(viz.pca(maps[0], facet, layer=i))[0] for facet in ("key", "value") for i in (0, 1)
    ]
    assert len({one.tobytes() for one in drawn}) == 4
    assert_same_bits(shown(viz.pca(maps, layer=2))[0], shown(viz.pca(maps))[0])


def test_what_was_not_recorded_is_said(maps):
    with pytest.raises(InvalidInputError, match="facets="):
        viz.pca(maps, "query")
    with pytest.raises(OutOfRangeError, match="0, 1, 2"):
        viz.pca(maps, layer=3)


@pytest.mark.parametrize("method", ["chefer", "legrad"])
def test_a_relevance_shows_itself(method):
    model, images = of_fork()
    found = relevance(model, images, lambda out: out[:, 0], method)
    assert found._repr_png_()[:4] == b"\x89PNG"
    assert method in found._repr_html_()
    token = relevance(model, images, lambda out: out[:, 0], queries=[3])
    assert token._repr_png_() is not None
