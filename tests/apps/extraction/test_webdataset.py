"""Shards that the library webdataset writes."""

from __future__ import annotations

import pytest
from PIL import Image

from dinov2_attn import AttentionDataset, extract
from tests.support.extraction import build, draw

webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")


@pytest.mark.filterwarnings("ignore")  # those of the library
def test_a_shard_is_a_source(first, tmp_path):
    images = [draw(tmp_path / "in" / f"{i}.png", (4, 6), i) for i in range(5)]
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=3, verbose=0) as shards:
        for i, path in enumerate(images):
            image = Image.open(path).convert("RGB")
            shards.write({"__key__": f"{i:06}", "png": image, "cls": i, "json": {"number": i}})
    done = extract(build(first).eval(), str(tmp_path / "train-*.tar"), tmp_path / "out")
    assert done.passed_over == {".cls": 5, ".json": 5}
    found = AttentionDataset(tmp_path / "out")
    assert [entry["path"] for entry in found.entries()] == [f"{i:06}.png" for i in range(5)]
    assert {entry["source"] for entry in found.entries()} == {"train-0000.tar", "train-0001.tar"}
