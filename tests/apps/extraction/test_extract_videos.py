"""Frames of videos as images of an extraction, by their numbers and times."""

from __future__ import annotations

import os

import numpy as np
import pytest

from dinov2_attn import AttentionDataset, extract, install
from dinov2_attn.apps.extraction.items import list_items
from dinov2_attn.apps.viz.videos import Sampling, open_video
from dinov2_attn.errors import UnreadableFileError
from tests.support.extraction import build, draw, index_of
from tests.support.videos import write_video

pytest.importorskip("av")


@pytest.fixture
def folder(tmp_path):
    """An image, a video and a broken one."""
    frames = np.random.default_rng(0).integers(0, 256, (7, 16, 20, 3), dtype=np.uint8)
    source = tmp_path / "in"
    draw(source / "a.png", (4, 6), 0)
    write_video(source / "b.mp4", list(frames), rate=10)
    (source / "c.mp4").write_bytes((source / "b.mp4").read_bytes()[:200])
    return source


def test_frames_are_listed_by_their_numbers(folder):
    names = [item.path for item in list_items([folder], sampling=Sampling(every=3))]
    assert names == ["a.png", "b.mp4#0", "b.mp4#3", "b.mp4#6", "c.mp4"]
    (folder / "list.txt").write_text("b.mp4\na.png\n")
    names = [item.path for item in list_items([folder / "list.txt"])]
    assert names == [*(f"b.mp4#{i}" for i in range(7)), "a.png"]
    assert [item.time for item in list_items([folder / "b.mp4"])][:2] == [0.0, 0.1]


@pytest.mark.parametrize("transform", [None, lambda image: image])
def test_frames_are_extracted_and_a_broken_video_is_one_failure(first, folder, tmp_path, transform):
    with install(first.package):
        model = build(first).eval()
        done = extract(model, folder, tmp_path / "out", every=2, transform=transform)
    assert (done.images, done.unreadable) == (6, 1)
    entries = index_of(tmp_path / "out")
    assert [entry["path"] for entry in entries][1:] == [f"b.mp4#{i}" for i in (0, 2, 4, 6)]
    assert [entry["frame"] for entry in entries[1:]] == [0, 2, 4, 6]
    assert [entry["time"] for entry in entries[1:]] == [0.0, 0.2, 0.4, 0.6]
    assert all(entry["size"] == [16, 20] for entry in entries[1:])
    assert len({entry["checksum"] for entry in entries}) == 5, "each frame has a map of its own"
    readme = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "its number in `frame` and its seconds in `time`" in readme
    (refused,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert refused["path"] == "c.mp4"
    assert "without any frame" in refused["reason"]


def test_tables_have_the_numbers_and_times_of_frames(first, folder, tmp_path):
    """And images have none."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: the index has them")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the index has them")
    extract(build(first), folder, tmp_path / "out", shard_size=2, index="parquet")
    entries = index_of(tmp_path / "out")
    table = AttentionDataset(tmp_path / "out").frame()
    read = pandas.read_parquet(tmp_path / "out" / "index.parquet")
    for found in (table, read):
        for column in ("frame", "time"):
            expected = [entry.get(column) for entry in entries]
            assert [None if pandas.isna(one) else one for one in found[column]] == expected
    assert table["frame"].dtype == "Int64"
    assert table["frame"].isna().sum() == 1


def test_another_sampling_is_another_extraction(first, folder, tmp_path):
    from dinov2_attn.errors import InvalidInputError

    with install(first.package):
        model = build(first).eval()
        extract(model, folder / "b.mp4", tmp_path / "out", fps=5)
        assert len(index_of(tmp_path / "out")) == 4
        with pytest.raises(InvalidInputError):
            extract(model, folder / "b.mp4", tmp_path / "out", fps=2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_that_is_called_like_a_video_is_not_waited_for(first, folder, tmp_path):
    os.mkfifo(folder / "pipe.mp4")
    assert [item.path for item in list_items([folder])][-1] == "pipe.mp4"
    with install(first.package):
        extract(build(first).eval(), folder, tmp_path / "out")
    refused = index_of(tmp_path / "out", "unreadable.jsonl")
    assert "found pipe.mp4, which is a pipe" in refused[-1]["reason"]
    with pytest.raises(UnreadableFileError, match="a pipe, a device or a folder"):
        open_video(folder / "pipe.mp4")
