"""Pictures of statistics show the numbers of each head, and what patches receive."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov2_attn import Statistics, record, statistics, viz
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from tests.maps.test_gradients import of_fork
from tests.support.tolerances import assert_close


@pytest.fixture(scope="module")
def found():
    model, images = of_fork(depth=4)
    return statistics(model, images)


def heights(ax):
    """The dots of each layer; the last line is the dashed one."""
    return [line.get_ydata() for line in ax.lines if line.get_marker() == "."]


def test_each_head_has_a_dot_in_each_layer(found):
    figure = viz.plot_statistics(found, ("entropy", "distance"))
    for ax, name in zip(figure.axes, ("entropy", "distance"), strict=True):
        expected = found.by_head(name).mean(1).sort(-1).values
        assert_close(np.stack(heights(ax)), expected.numpy())
    assert [ax.get_ylabel() for ax in figure.axes] == ["entropy (nats)", "mean distance (patches)"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "3"]


def test_images_queries_and_pixels_may_be_chosen(found):
    figure = viz.plot_statistics(found, "distance", sample=1, patch_size=14)
    expected = 14 * found.by_head("distance")[:, 1].sort(-1).values
    assert_close(np.stack(heights(figure.axes[0])), expected.numpy())
    assert figure.axes[0].get_ylabel() == "mean distance (pixels)"
    figure = viz.plot_statistics(found, "entropy", queries="cls")
    expected = found.by_head("entropy", "cls").mean(1).sort(-1).values
    assert_close(np.stack(heights(figure.axes[0])), expected.numpy())
    assert "Attention of CLS" in figure._suptitle.get_text()


def test_a_panel_without_numbers_says_so(found):
    """CLS has no position, so no distance."""
    figure = viz.plot_statistics(found, ("entropy", "distance"), queries="cls")
    entropy, distance = ([text.get_text() for text in ax.texts] for ax in figure.axes)
    assert (entropy, distance) == ([], ["these tokens have none: NaN"])


def test_the_dashed_line_is_that_of_uniform_attention():
    """Of weights that are all alike, every dot is on it."""
    model, images = of_fork()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.qkv.bias)
    even = statistics(model, images)
    figure = viz.plot_statistics(even)
    assert len(figure.axes) == 4
    for ax in figure.axes:
        (level,) = {line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"}
        assert_close(np.stack(heights(ax)), np.full((3, 2), level))


def test_the_map_is_what_patches_receive(found):
    tokens = found["received"][0].shape[-1]
    values = viz.plot_received(found, layer=1, head=1, sample=1).images[0].get_array()
    assert_close(values, (found.patch_maps("received")[1][1, 1] * tokens).numpy())
    mean = viz.plot_received(found).images[0].get_array()
    assert_close(mean, (found.patch_maps("received")[-1][0].mean(0) * tokens).numpy())
    over = viz.plot_received(found, image=np.zeros((4, 6, 3), np.uint8), warning="random weights")
    assert len(over.images) == 2


def test_recordings_arrays_and_means_of_heads_are_drawn():
    model, images = of_fork()
    with torch.no_grad(), record(model, statistics=("received", "entropy"), heads="mean") as maps:
        model(images)
    for one in (maps, maps[0], maps.statistics, maps.statistics.numpy()):
        assert heights(viz.plot_statistics(one).axes[0])[0].shape == (1,)
        assert viz.plot_received(one).images[0].get_array().shape == (2, 3)
    assert maps.statistics._repr_png_()


def test_notebooks_show_what_is_there(found):
    assert found._repr_png_().startswith(b"\x89PNG")
    some = replace(found, values={"received": found["received"]})
    assert some._repr_png_().startswith(b"\x89PNG")
    no_grid = replace(found, values={"entropy": found["entropy"]}, grid=None)
    assert no_grid._repr_png_().startswith(b"\x89PNG")
    only = Statistics({"centroid": found["centroid"]}, found.layers, found.grid, found.prefix)
    assert only._repr_png_() is None
    assert "centroid" in only._repr_html_()


def test_what_cannot_be_drawn_is_refused(found):
    only = replace(found, values={"received": found["received"]})
    with pytest.raises(InvalidInputError, match=r"viz\.plot_received"):
        viz.plot_statistics(only)
    with pytest.raises(InvalidInputError, match="the statistic 'entropy'"):
        viz.plot_statistics(only, "entropy")
    with pytest.raises(InvalidInputError, match="a list"):
        viz.plot_statistics([found])
    with pytest.raises(InvalidInputError, match="a row and a column"):
        viz.plot_statistics(found, "centroid")
    with pytest.raises(OutOfRangeError):
        viz.plot_statistics(found, sample=2)
    with pytest.raises(OutOfRangeError):
        viz.plot_received(found, layer=9)
