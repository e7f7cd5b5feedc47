"""``extract(statistics=…)``: numbers of every head and token, beside the maps."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import AttentionDataset, AttentionMaps, extract, statistics, viz
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.resample import resample
from tests.support.extraction import build, photographs
from tests.support.statistics import ALL, assert_statistics
from tests.support.tolerances import assert_close, assert_same_bits


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("images") / "in")


def alone(model, path, **how):
    found = statistics(model, load_image(path, 2).tensor[None], ALL, [1, 2], **how)
    return found, {name: torch.stack(found[name], 1)[0] for name in ALL}


@pytest.mark.parametrize("heads", [None, "mean"])
def test_each_image_has_the_statistics_it_has_alone(model, images, tmp_path, heads):
    extract(model, images, tmp_path, layers=[1, 2], statistics=ALL, heads=heads, shard_size=5)
    stored = AttentionDataset(tmp_path)
    assert len(stored) == 12
    for number, row in enumerate(stored):
        assert stored.entry(number)["statistics"] == list(ALL)
        found, expected = alone(model, images / row["path"], heads=heads)
        assert_statistics({name: row[name] for name in ALL}, expected)
        maps = stored.maps(number)
        for name in ALL:
            assert_same_bits(torch.stack(maps.statistics[name], 1)[0], row[name])
        assert maps.statistics.grid == found.grid


def test_on_another_grid_patches_have_the_mean_of_what_lies_in_them(model, images, tmp_path):
    extract(model, images, tmp_path, layers=[1, 2], statistics=ALL, grid=(2, 3))
    stored = AttentionDataset(tmp_path)
    for row in stored:
        found, expected = alone(model, images / row["path"])
        prefix, (height, width) = found.prefix, found.grid
        for name in ("distance", "received"):
            assert row[name].shape[-1] == prefix + 6
            patches = expected[name][..., prefix:].unflatten(-1, (height, width))
            moved = resample(patches, (2, 3))
            if name == "distance":
                moved = moved / resample(torch.ones_like(patches), (2, 3))
            assert_close(row[name][..., prefix:], moved.flatten(-2))
        assert_close(row["entropy"][..., :prefix], expected["entropy"][..., :prefix])
        assert row["centroid"].shape[-2:] == (prefix + 6, 2)
    assert stored.maps(0).statistics.patch_maps("centroid")[0].shape[-3:] == (2, 3, 2)


def test_on_another_grid_the_line_of_uniform_attention_stays(model, images, tmp_path):
    extract(model, images, tmp_path / "own", layers=2, statistics=ALL)
    extract(model, images, tmp_path / "moved", layers=2, statistics=ALL, grid=(2, 3))
    for number in (0, 5):
        own, moved = (AttentionDataset(tmp_path / one).maps(number) for one in ("own", "moved"))
        assert moved.statistics.seen == own.statistics.grid
        assert own.statistics.seen is None
        moved.save(tmp_path / "one")
        again = AttentionMaps.load(tmp_path / "one").to("cpu")
        assert again.statistics.seen == own.statistics.grid
        assert levels(again) == levels(moved) == levels(own)


def levels(maps):
    """The dashed line of each picture."""
    lines = [ax.lines for ax in viz.plot_statistics(maps).axes]
    dashed = [[one.get_ydata()[0] for one in own if one.get_linestyle() == "--"] for own in lines]
    assert [len(one) for one in dashed] == [1] * 4
    return dashed


def test_they_are_float32_whatever_maps_are_and_counted_before(model, images, tmp_path):
    how = {"layers": 2, "dtype": "float16"}
    plain = extract(model, images, tmp_path, dry_run=True, **how).bytes
    names = ("entropy", "centroid")
    more = extract(model, images, tmp_path, dry_run=True, statistics=names, **how).bytes
    extract(model, images, tmp_path / "out", statistics=names, **how)
    rows = list(AttentionDataset(tmp_path / "out"))
    assert {row[name].dtype for row in rows for name in names} == {torch.float32}
    assert more - plain == sum(4 * row[name].numel() for row in rows for name in names)


def test_the_folder_says_what_they_are_and_a_batch_has_them(model, images, tmp_path):
    extract(model, images, tmp_path, layers=2, statistics=["entropy", "centroid"], facets="key")
    stored = AttentionDataset(tmp_path)
    assert stored.about["tensors"]["entropy"] == ["layers", "heads", "tokens"]
    assert stored.about["tensors"]["centroid"][-1] == "row and column"
    assert "axes of `N.entropy`" in (tmp_path / "README.md").read_text()
    rows = list(stored)
    batch = stored.collate(rows)
    for number, row in enumerate(rows):
        assert_same_bits(batch["entropy"][number, ..., : row["entropy"].shape[-1]], row["entropy"])
    assert batch["centroid"].shape[-1] == 2


def test_other_names_are_said_before_the_first_image(model, images, tmp_path):
    with pytest.raises(InvalidInputError, match="'entropy', 'distance'"):
        extract(model, images, tmp_path / "out", statistics=["entropies"])
    assert not (tmp_path / "out").exists()
