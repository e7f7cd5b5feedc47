"""Maps of an extraction as heatmaps of FiftyOne."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.extraction.heatmaps import heatmap_of
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from tests.support.extraction import build, photographs
from tests.support.subprocesses import python
from tests.support.tolerances import assert_close, assert_same_bits

NEEDS_FIFTYONE = pytest.mark.skipif(
    importlib.util.find_spec("fiftyone") is None,
    reason="fiftyone (0.7 GB) is not installed: the map and its range are tested without it",
)


@pytest.fixture
def images(tmp_path):
    return photographs(tmp_path / "in", 6)


@pytest.fixture
def stored(first, images, tmp_path):
    extract(build(first).eval(), images, tmp_path / "out", layers=[0, 2])
    return AttentionDataset(tmp_path / "out")


def test_a_heatmap_is_the_map_and_its_range(stored):
    """What FiftyOne documents: a 2D array of floats, and [min, max]."""
    for i in range(6):
        values, ends = heatmap_of(stored, i, None, "mean", None)
        assert values.dtype == np.float32
        assert_close(values, stored[i]["maps"][-1].mean(0)[0])
        assert ends == [0.0, float(values.max())]
    values, _ = heatmap_of(stored, 0, 0, 1, "cls")
    assert_same_bits(values, stored[0]["maps"][0, 1, 0].numpy())


def test_several_queries_have_to_be_told_apart(first, images, tmp_path):
    extract(build(first).eval(), images, tmp_path / "all", queries=["cls", (0, 1)])
    several = AttentionDataset(tmp_path / "all")
    with pytest.raises(InvalidInputError, match="Say which"):
        heatmap_of(several, 0, None, "mean", None)
    values, _ = heatmap_of(several, 0, None, "mean", (0, 1))
    assert_close(values, several[0]["maps"][0].mean(0)[1])
    with pytest.raises(OutOfRangeError):
        heatmap_of(several, 0, None, "mean", (1, 1))


@NEEDS_FIFTYONE
@pytest.mark.filterwarnings("ignore")  # those of its many dependencies
class TestFiftyOne:
    def test_samples_are_made_for_all_images(self, stored, images):
        samples = stored.fiftyone(images)
        assert len(samples) == 6
        for i, sample in enumerate(samples):
            assert sample.filepath == str((images / stored.entry(i)["path"]).resolve())
            values, ends = heatmap_of(stored, i, None, "mean", None)
            assert_same_bits(sample.attention.map, values)
            assert list(sample.attention.range) == ends

    def test_samples_that_are_there_get_a_field(self, stored, images):
        import fiftyone as fo

        samples = [fo.Sample(filepath=str(path)) for path in sorted(images.rglob("*.png"))[:4]]
        found = stored.fiftyone(images, samples, field="head1", layer=0, head=1)
        assert {id(one) for one in found} == {id(one) for one in samples}
        assert all(one.head1.map.ndim == 2 for one in samples)

    def test_maps_may_be_files(self, stored, images, tmp_path):
        samples = stored.fiftyone(images, folder=tmp_path / "maps")
        for i, sample in enumerate(samples):
            values, (_, high) = heatmap_of(stored, i, None, "mean", None)
            assert sample.attention.map is None
            assert_close(sample.attention.get_map() / 255 * high, values, within=high / 255)

    def test_images_that_are_elsewhere_are_said(self, stored, images, tmp_path):
        with pytest.raises(InvalidInputError, match="Name the folder"):
            stored.fiftyone(tmp_path)
        with pytest.raises(InvalidInputError, match="source 'in'"):
            stored.fiftyone({"other": images})
        assert len(stored.fiftyone({"in": images})) == 6


def test_without_fiftyone_the_error_names_the_extra(tmp_path):
    code = """
import sys
sys.modules["fiftyone"] = None
from dinov2_attn.apps.extraction.heatmaps import _library
try:
    _library()
except Exception as error:
    print(error.hint)
"""
    done = python("-c", code, cwd=tmp_path)
    assert "pip install 'dinov2-attn[fiftyone]'" in done.stdout, done.stderr
