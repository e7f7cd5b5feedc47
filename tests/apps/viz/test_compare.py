"""Two models side by side: one scale, the difference, other grids, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov2_attn import viz
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.cli.two_models import _with_folders
from dinov2_attn.apps.viz.difference import pair_of, patch_at
from dinov2_attn.apps.weights.models import build
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.maps.attention_maps import AttentionMaps
from tests.support.strategies import randomise
from tests.support.tolerances import assert_close

pytest.importorskip("matplotlib")
pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights


def maps(grid, prefix=1, heads=3, seed=0, layers=(11,)):
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + math.prod(grid)
    shape = (2, heads, tokens, tokens)
    weights = [torch.randn(shape, generator=generator).softmax(-1) for _ in layers]
    return AttentionMaps(tuple(weights), layers, grid, prefix)


def cells(figure):
    """Return what the cells of a figure show, the image left out."""
    return [drawn.get_array() for drawn in figure.axes[0].images if drawn.get_array().ndim == 2]


def caption(figure):
    return " ".join(text.get_text() for text in figure.texts)


def titles(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_both_maps_have_one_scale_and_the_difference_its_own():
    a, b = maps((3, 5)), maps((3, 5), seed=1)
    figure = viz.compare(a, b, names=("before", "after"), style=viz.Style(limits="shared"))
    first, second, difference = (drawn for drawn in figure.axes[0].images)
    assert first.norm is second.norm
    highest = max(drawn.get_array().max() for drawn in (first, second))
    assert_close(first.norm.vmax, highest)
    assert_close(difference.get_array().data, (second.get_array() - first.get_array()).data)
    assert difference.norm.vmin == -difference.norm.vmax == -np.abs(difference.get_array()).max()
    assert titles(figure) == ["A", "B", "B − A"]
    for said in ("A: before.", "B: after.", "red where B gives more"):
        assert said in caption(figure)
    assert len(figure.axes) == 3, "the maps and two bars"


def test_white_is_zero_blue_is_a_and_red_is_b():
    a, b = maps((2, 2)), maps((2, 2), seed=1)
    difference = viz.compare(a, b).axes[0].images[2]
    white, blue, red = difference.cmap(difference.norm([0, *difference.norm.inverse([0, 1])]))
    assert min(white[:3]) > 0.95
    assert blue[2] > blue[0]
    assert red[0] > red[2]


def test_the_same_maps_differ_nowhere():
    figure = viz.compare(maps((3, 4)), maps((3, 4)))
    assert not cells(figure)[2].any()
    assert "B − A is zero in every patch" in caption(figure)


@pytest.mark.parametrize(("a", "b"), [((3, 5), (6, 10)), ((6, 10), (3, 5)), ((14, 14), (16, 16))])
def test_a_finer_grid_is_averaged_over_the_patches_of_the_coarser_one(a, b):
    one, other = maps(a, seed=1), maps(b, prefix=5, seed=2)
    pair = pair_of(one, other, None, "cls", 1)
    assert pair.grid == min(a, b)
    both = pair.times("mean")
    # The mean over the image is that of both maps, whatever the grids are.
    assert_close(pair.difference("mean").mean(), both[1].mean() - both[0].mean())
    if a == (3, 5):
        blocks = both[1].reshape(3, 2, 5, 2).mean((1, 3))
        assert_close(pair.difference("mean"), blocks - both[0])
    assert "on the grid with fewer" in caption(viz.compare(one, other))


def test_the_share_elsewhere_is_half_of_what_differs_and_registers_are_one_place():
    one, other = maps((2, 3), seed=1), maps((2, 3), prefix=5, seed=2)
    pair = pair_of(one, other, None, "cls", 0)
    rows = [each.weights[0][0].mean(0)[0].double().numpy() for each in (one, other)]
    wanted = np.abs(rows[1][5:] - rows[0][1:]).sum() + abs(rows[1][:5].sum() - rows[0][0])
    assert_close(pair.moved("mean"), wanted / 2)
    assert pair_of(one, one, None, "cls", 0).moved("mean") == 0


def test_a_patch_is_the_one_at_the_same_place_and_a_register_that_of_its_number():
    one, other = maps((4, 6), prefix=3), maps((8, 12), prefix=5, seed=1)
    pair = pair_of(one, other, None, (1, 2), 0)
    assert pair.rows[0].patch == (1, 2)
    assert pair.rows[1].patch == (3, 5)
    assert pair_of(one, other, None, "register:2", 0).rows[1].query == 2
    assert pair_of(one, other, None, 3, 0).rows[1].patch == (1, 1), "position 3 is patch (0, 0)"
    assert patch_at((3, 9), (14, 14), (16, 16)) == (4, 10)
    with pytest.raises(OutOfRangeError):
        viz.compare(one, maps((4, 6)), query="register:2")


def test_each_head_has_a_row_if_both_have_as_many():
    one, other = maps((2, 3)), maps((2, 3), seed=1)
    assert len(cells(viz.compare(one, other, head=None))) == 3 * 4
    assert len(cells(viz.compare(one, maps((2, 3), heads=2), head=None))) == 3
    assert_close(
        cells(viz.compare(one, other, head=2))[0].data, 7 * one.at(head=2).double().numpy()
    )


def test_layers_are_the_last_of_each_or_one_that_both_have():
    one, other = maps((2, 3), layers=(10, 11)), maps((2, 3), layers=(22, 23), seed=1)
    assert "layer 11 of A and 23 of B" in caption(viz.compare(one, other))
    assert "layer 10 of A and 22 of B" in caption(viz.compare(one, other, layer=-2))
    with pytest.raises(OutOfRangeError):
        viz.compare(one, other, layer=11)


@pytest.mark.parametrize("other", [(14, 7), (7, 16), (14, 14)])
def test_grids_of_other_shapes_are_refused(other):
    with pytest.raises(InvalidInputError, match="of the same shape"):
        viz.compare(maps((7, 14)), maps(other))


@pytest.mark.parametrize("other", [(37, 50), (32, 43), (33, 44), (74, 100)])
def test_grids_that_one_image_can_have_are_taken(other):
    pair = pair_of(*(replace(one, queries=(0,)) for one in rows((37, 50), other)), None, "cls", 0)
    assert pair.difference("mean").shape == min((37, 50), other)


def rows(*grids):
    for grid in grids:
        one = maps((1, 1), prefix=math.prod(grid))
        yield replace(one, weights=(one.weights[0][:, :, :1],), prefix=1, grid=grid)


def test_limits_of_each_are_refused():
    with pytest.raises(InvalidInputError, match="limits that two models share"):
        viz.compare(maps((2, 3)), maps((2, 3)), style=viz.Style(limits="each"))


def test_a_warning_stays_with_the_picture():
    assert "no meaning" in caption(viz.compare(maps((2, 3)), maps((2, 3)), warning="no meaning"))


# The command line


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A checkpoint of random weights, and one with other patches."""
    folder = tmp_path_factory.mktemp("others")
    torch.save(randomise(build("vit_small"), 1).state_dict(), folder / "b.pth")
    torch.save(randomise(build("vit_small", patch_size=16), 2).state_dict(), folder / "c.pth")
    return folder


def draw(image, out, *options):
    size = ("--image-size", "42", "70")
    return main(["heatmap", str(image), "-o", str(out), *map(str, options), *size])


@pytest.mark.usefixtures("imported")
def test_two_checkpoints_are_drawn_and_their_numbers_written(image, weights, others, tmp_path):
    out = tmp_path / "out"
    both = ("--weights", weights, "--weights", others / "b.pth")
    assert draw(image, out, *both, "--queries", "cls", "1,2") == 0
    names = {path.name for path in out.iterdir()}
    assert {"compare.png", "compare-heads.png", "compare-1-2.png", "compare.json"} <= names
    found = json.loads((out / "compare.json").read_text())
    assert found["A"]["model"].endswith("planted.pth")
    assert found["B"]["model"].endswith("b.pth")
    a, b = (np.load(out / f"attention-{letter}.npy") for letter in "ab")
    assert a.shape == b.shape == (6, 3, 5)
    row, column = found["B - A"]["mean"]["most above A"]["patch"]
    difference = (b - a).mean(0) * found["A"]["tokens"]
    assert_close(difference[row, column], np.float32(difference.max()))
    record = json.loads((out / "run.json").read_text())
    assert record["options"]["weights"] == [str(weights), str(others / "b.pth")]
    assert set(record["files"]) == names - {"run.json"}
    assert draw(image, out, "--weights", weights) == 0
    assert not (out / "compare.png").exists(), "the run before is removed"


@pytest.mark.usefixtures("imported")
def test_models_of_other_patches_see_one_crop_on_one_grid(image, weights, others, tmp_path):
    assert draw(image, tmp_path, "--weights", weights, "--weights", others / "c.pth") == 0
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["A"]["grid"] == found["B"]["grid"] == [3, 5]


@pytest.mark.usefixtures("imported")
def test_an_option_that_is_given_once_is_for_both(image, tmp_path):
    models = ("--random-weights", "--patch-size", "14", "--patch-size", "16")
    assert draw(image, tmp_path, "--arch", "vit_small", *models) == 0
    model = json.loads((tmp_path / "compare.json").read_text())["model"]
    assert model == "A: ViT-S/14, random weights; B: ViT-S/16, random weights"


def test_a_third_model_is_too_many(image, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(image, tmp_path, *(("--weights", "a.pth") * 3))
    assert "Two models can be compared" in capsys.readouterr().err


def test_files_of_one_name_are_told_apart_by_their_folders():
    paths = ["runs/1/teacher.pth", "runs/2/teacher.pth"]
    names = [f"ViT-S/14, {path.rpartition('/')[2]}" for path in paths]
    assert _with_folders(names, paths) == ["ViT-S/14, 1/teacher.pth", "ViT-S/14, 2/teacher.pth"]
    assert _with_folders(["one", "one"], ["a.pth", "a.pth"]) == ["one", "one"]
