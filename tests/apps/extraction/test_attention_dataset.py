"""``AttentionDataset``: what ``extract`` stored comes back, lazily, or an error says why not."""

from __future__ import annotations

import json
import pickle

import pytest
from torch.utils.data import DataLoader

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.extraction.read import MOST_OPEN
from dinov2_attn.errors import OutOfRangeError, UnreadableFileError
from tests.support.extraction import build, photographs, stored
from tests.support.tolerances import assert_same_bits


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture
def out(model, tmp_path):
    folder = photographs(tmp_path / "in", 23)
    (folder / "broken.jpg").write_bytes(b"no image")
    extract(model, folder, tmp_path / "out", shard_size=1, layers=None, dtype="bfloat16")
    return tmp_path / "out"


def test_each_image_is_read_in_any_order(out):
    dataset = AttentionDataset(out)
    expected = list(stored(out))
    assert len(dataset) == len(expected) == 23 > MOST_OPEN
    for i in (*range(22, -1, -1), *range(0, 23, 3)):
        entry, maps, prefix = expected[i]
        found = dataset[i]
        assert_same_bits(found["maps"], maps)
        assert_same_bits(found["prefix"], prefix)
        assert (found["path"], found["number"]) == (entry["path"], entry["number"])
        assert dataset.entry(i) == entry
    assert dataset[-1]["path"] == expected[-1][0]["path"]
    assert len(dataset._open) <= MOST_OPEN


def test_what_was_not_read_is_listed(out):
    dataset = AttentionDataset(out)
    (refused,) = dataset.unreadable()
    assert refused["path"] == "broken.jpg"
    assert all(one["path"] != "broken.jpg" for one in dataset)
    assert dataset.about["options"]["layers"] == [0, 1, 2]


@pytest.mark.parametrize("i", [23, -24])
def test_an_image_that_is_not_there(out, i):
    with pytest.raises(OutOfRangeError, match="Expected an image from 0 to 22"):
        AttentionDataset(out)[i]


def test_shards_are_opened_when_they_are_first_needed(out):
    dataset = AttentionDataset(out)
    for path in out.glob("shards/*.safetensors"):
        if path.stem != "00003":
            path.unlink()
    assert dataset[3]["maps"].shape[:3] == (3, 2, 1)
    with pytest.raises(UnreadableFileError, match="00004"):
        dataset[4]


def test_workers_of_a_loader_open_their_own(model, tmp_path):
    photographs(tmp_path / "in", 10)
    extract(model, tmp_path / "in", tmp_path / "out", grid=(3, 4), shard_size=4)
    dataset = AttentionDataset(tmp_path / "out")
    first = dataset[0]["maps"]
    assert pickle.loads(pickle.dumps(dataset))._open == {}
    loader = DataLoader(dataset, batch_size=5, num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    assert [batch["maps"].shape for batch in batches] == [(5, 1, 2, 1, 3, 4)] * 2
    assert_same_bits(batches[0]["maps"][0], first)
    assert batches[1]["number"].tolist() == [5, 6, 7, 8, 9]


def test_other_bytes_are_noticed(out):
    path = out / "shards" / "00005.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=r"other bytes for image 5 in shards/00005"):
        AttentionDataset(out)[5]
    assert AttentionDataset(out, verify=False)[5]["number"] == 5


@pytest.mark.parametrize("text", ["{", '{"shard": 0}', "[]", "null", "\n"])
def test_the_damaged_index_of_a_shard_is_written_again(model, out, tmp_path, text):
    path = out / "shards" / "00005.jsonl"
    whole = path.read_bytes()
    path.write_text(text)
    extract(model, tmp_path / "in", out, shard_size=1, layers=None, dtype="bfloat16")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_a_shard_cut_short_is_noticed_and_made_again(model, out, tmp_path, length):
    path = out / "shards" / "00005.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(UnreadableFileError, match="run the extraction again"):
        AttentionDataset(out)[5]
    extract(model, tmp_path / "in", out, shard_size=1, layers=None, dtype="bfloat16")
    assert path.read_bytes() == whole


def test_the_error_for_an_unfinished_extraction_names_the_next_step(out):
    (out / "index.jsonl").unlink()
    with pytest.raises(UnreadableFileError, match="(?s)Run the same .* again: it continues"):
        AttentionDataset(out)


@pytest.mark.parametrize("text", ["{", "[]\n", '{"number": 0}\n', "\n"])
def test_the_error_for_a_damaged_index_names_the_next_step(out, text):
    (out / "index.jsonl").write_text(text)
    with pytest.raises(UnreadableFileError, match="(?s)index.jsonl.*run the extraction again"):
        AttentionDataset(out)[0]


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UnreadableFileError, match="Expected an extraction"):
        AttentionDataset(tmp_path)


def test_the_index_is_plain_json(out):
    lines = (out / "index.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["number"] for line in lines] == [
        entry["number"] for entry, *_ in stored(out)
    ]
