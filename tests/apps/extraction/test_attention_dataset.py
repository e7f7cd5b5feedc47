"""``AttentionDataset``: what ``extract`` stored comes back, lazily, or an error says why not."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import dinov2_attn
from dinov2_attn import AttentionDataset, attention_maps, extract
from dinov2_attn.apps.extraction.read import MOST_OPEN
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError, OutOfRangeError, UnreadableFileError
from tests.support.extraction import build, photographs, stored
from tests.support.tolerances import assert_close, assert_same_bits


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


def test_it_is_said_in_one_line(out):
    maps = AttentionDataset(out)
    said = f"AttentionDataset({str(out)!r}, images={len(maps)}, layers="
    assert repr(maps).startswith(said)
    assert "queries=[" in repr(maps)
    assert "\n" not in repr(maps)
    assert f"images={len(maps[:2])}, " in repr(maps[:2])


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


# By path, slices, tables, maps and batches


def test_an_image_is_found_by_its_path(out):
    dataset = AttentionDataset(out)
    for i in (0, 7, 22):
        path = dataset.entry(i)["path"]
        assert dataset[path]["number"] == dataset.entry(i)["number"]
        assert dataset[PurePosixPath(path)]["path"] == path
        assert dataset.positions(path) == [i]
        assert dataset.positions(path, "in") == [i]
        assert dataset.positions(path, "another") == []


def test_a_path_that_is_not_there_names_the_nearest(out):
    dataset = AttentionDataset(out)
    path = dataset.entry(4)["path"]
    with pytest.raises(InvalidInputError, match=f"'{path[:-1]}'; '{path}' is there"):
        dataset[path[:-1]]
    with pytest.raises(InvalidInputError, match="unreadable"):
        dataset["broken.jpg"]
    with pytest.raises(InvalidInputError) as caught:
        dataset["\x1b[31m" + "x" * 10**6]
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


def test_a_path_of_two_sources_is_chosen_by_its_source(model, tmp_path):
    for name in ("one", "two"):
        photographs(tmp_path / name, 3)
    extract(model, [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    dataset = AttentionDataset(tmp_path / "out")
    path = dataset.entry(1)["path"]
    with pytest.raises(InvalidInputError, match="at 2 positions"):
        dataset[path]
    assert dataset.positions(path) == [1, 4]
    assert dataset.positions(path, "two") == [4]


@given(
    start=st.none() | st.integers(-30, 30),
    stop=st.none() | st.integers(-30, 30),
    step=st.none() | st.integers(-3, 3).filter(bool),
)
def test_a_slice_is_a_dataset_of_these_images(sliced, start, stop, step):
    dataset = AttentionDataset(sliced)
    part = dataset[start:stop:step]
    expected = list(range(len(dataset)))[start:stop:step]
    assert [entry["number"] for entry in part.entries()] == expected
    assert len(part) == len(expected)
    if expected:
        assert_same_bits(part[0]["maps"], dataset[expected[0]]["maps"])
        assert part.positions(part.entry(-1)["path"]) == [len(part) - 1]


@pytest.fixture(scope="module")
def sliced(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sliced")
    extract(model, photographs(folder / "in", 11), folder / "out", shard_size=4)
    return folder / "out"


def test_the_index_is_a_table(model, tmp_path):
    pytest.importorskip("pandas")
    photographs(tmp_path / "in", 6)
    options = {"layers": [0, 2], "artifacts": True}
    extract(model, tmp_path / "in", tmp_path / "out", **options)
    dataset = AttentionDataset(tmp_path / "out")
    table = dataset.frame()
    assert len(table) == len(dataset) == 6
    for i, entry, row in zip(range(6), dataset.entries(), table.itertuples(), strict=True):
        assert row.Index == i
        assert [row.prefix_mass_0, row.prefix_mass_2] == entry["prefix_mass"]
        assert [row.entropy_0, row.entropy_2] == entry["entropy"]
        assert [row.height, row.width] == entry["size"]
        assert [row.rows, row.columns] == entry["grid"]
        assert row.artifacts == len(entry["artifacts"]["tokens"])
        for name in ("number", "source", "path", "shard", "sha256", "checksum"):
            assert getattr(row, name) == entry[name]
    highest = table.sort_values("entropy_2").index[-1]
    assert dataset[highest]["path"] == table.path[highest]
    assert list(dataset[:0].frame()) == list(table)


def test_what_is_missing_is_missing_in_the_table(out):
    pytest.importorskip("pandas")
    lines = (out / "index.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    entry["entropy"][0] = None
    (out / "index.jsonl").write_text("\n".join([json.dumps(entry), *lines[1:]]) + "\n")
    table = AttentionDataset(out).frame()
    assert table.artifacts.isna().all()
    assert table.entropy_0.isna().sum() == 1


@pytest.mark.parametrize("heads", [None, "mean"])
@pytest.mark.parametrize("queries", ["cls", "patches", None, ["#0", "0,1", "#-1"]], ids=str)
def test_maps_are_those_of_the_model(model, tmp_path, heads, queries):
    photographs(tmp_path / "in", 5)
    asked = {"layers": [0, 2], "heads": heads}
    extract(model, tmp_path / "in", tmp_path / "out", queries=queries, **asked)
    dataset = AttentionDataset(tmp_path / "out")
    for i in range(5):
        found = dataset.maps(i)
        image = load_image(tmp_path / "in" / dataset.entry(i)["path"], 2).tensor[None]
        rows = list(found.queries)
        expected = attention_maps(model, image, queries=rows, **asked)
        assert (found.layers, found.grid, found.prefix) == ((0, 2), expected.grid, 1)
        assert found.queries == expected.queries
        for ours, theirs in zip(found.weights, expected.weights, strict=True):
            assert_close(ours, theirs, size=1.0)
    length = 1 + math.prod(found.grid)
    asked_for = {"cls": [0], "patches": [*range(1, length)], "None": [*range(length)]}
    assert rows == asked_for.get(str(queries), [0, 2, length - 1])


def test_the_maps_of_a_resampled_image_have_its_grid(model, tmp_path):
    photographs(tmp_path / "in", 5)
    options = {"queries": ["cls", "0,0", "1,1"], "grid": (6, 8)}
    extract(model, tmp_path / "in", tmp_path / "out", **options)
    dataset = AttentionDataset(tmp_path / "out")
    for i in range(5):
        maps, (height, width) = dataset.maps(i), dataset.entry(i)["grid"]
        assert_same_bits(maps.patch_maps()[0][0], dataset[i]["maps"][0])
        assert_same_bits(maps.prefix_mass()[0][0], dataset[i]["prefix"][0].sum(-1))
        cells = [divmod(query - 1, 8) for query in maps.queries[1:]]
        centres = [(int(6 * at / height), int(8 * other / width)) for at, other in CENTRES]
        assert cells == centres


CENTRES = [(0.5, 0.5), (1.5, 1.5)]


@pytest.mark.parametrize("heads", [None, "mean"])
def test_images_of_any_size_are_one_batch(model, tmp_path, heads):
    photographs(tmp_path / "in", 5)
    extract(model, tmp_path / "in", tmp_path / "out", queries="patches", heads=heads)
    dataset = AttentionDataset(tmp_path / "out")
    (batch,) = DataLoader(dataset, batch_size=5, collate_fn=dataset.collate)
    assert batch["path"] == [row["path"] for row in dataset]
    for b, row in enumerate(dataset):
        queries, height, width = batch["shape"][b].tolist()
        assert batch["number"][b] == row["number"]
        padded = batch["maps"][b]
        assert_same_bits(padded[..., :queries, :height, :width], row["maps"])
        assert_same_bits(padded[..., batch["mask"][b]], row["maps"].flatten(-3))
        assert_same_bits(batch["prefix"][b][..., :queries, :], row["prefix"])
        assert padded.count_nonzero() == row["maps"].count_nonzero()
        assert batch["prefix"][b].count_nonzero() == row["prefix"].count_nonzero()


# What is read back is checked


@pytest.mark.parametrize("number", [1, 3, 2.0, True, "2", None, "\x1b" * 10**6], ids=repr)
def test_a_format_that_is_not_known_is_refused(out, number):
    about = json.loads((out / "extraction.json").read_text())
    (out / "extraction.json").write_text(json.dumps({**about, "format": number}))
    with pytest.raises(UnreadableFileError, match="format 2 at") as caught:
        AttentionDataset(out)
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


WRONG = [
    *(("number", True), ("number", "0"), ("path", None), ("source", 5), ("shard", 5)),
    *(("size", [3]), ("size", "ab"), ("grid", None), ("grid", [4]), ("grid", [2.0, 2])),
    *(("prefix_mass", None), ("prefix_mass", "abc"), ("entropy", []), ("entropy", [[0]])),
    *(("artifacts", 5), ("artifacts", {}), ("facets", 5), ("facets", [1]), ("statistics", {})),
    *(("checksum", None), ("sha256", 0), ("frame", "1"), ("frame", None), ("time", [0])),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_line_with_another_kind_of_value_is_refused(out, name, value):
    lines = (out / "index.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), name: value})
    (out / "index.jsonl").write_text("\n".join(lines) + "\n")
    dataset = AttentionDataset(out)
    for call in (lambda: dataset[0], lambda: dataset.maps(0), lambda: dataset.positions("x")):
        with pytest.raises(UnreadableFileError, match=f"another kind of {name}"):
            call()
    dataset[1]


ABOUT = [
    *({"tensors": None}, {"tensors": {}}, {"tensors": {"layers": ["a"], "queries": ["cls"]}}),
    *({"tensors": {"layers": [0], "queries": None}}, {"model": {}}, {"model": {"prefix": "1"}}),
]


@pytest.mark.parametrize("change", ABOUT, ids=repr)
def test_a_description_without_what_readers_need_is_refused(out, change):
    about = json.loads((out / "extraction.json").read_text())
    (out / "extraction.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(UnreadableFileError, match="extraction.json that cannot be read"):
        AttentionDataset(out)


def test_json_of_any_depth_is_refused(out):
    deep = "[" * 200_000
    stored = (out / "index.jsonl").read_text()
    (out / "index.jsonl").write_text(f"{deep}\n{stored}")
    with pytest.raises(UnreadableFileError, match=r"index\.jsonl.*RecursionError"):
        AttentionDataset(out)[0]
    (out / "extraction.json").write_text(deep)
    with pytest.raises(UnreadableFileError, match="RecursionError"):
        AttentionDataset(out)


@pytest.mark.parametrize(
    "text", ["{", "null\n", "[" * 200_000, None], ids=["{", "null", "[[[", "-"]
)
def test_a_damaged_list_of_images_without_maps(out, text):
    (out / "unreadable.jsonl").unlink()
    if text is not None:
        (out / "unreadable.jsonl").write_text(text)
    with pytest.raises(UnreadableFileError, match=r"unreadable\.jsonl that cannot be read"):
        AttentionDataset(out).unreadable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["index.jsonl", "unreadable.jsonl", "shards/00000.safetensors"])
def test_no_pipe_is_waited_for(out, name):
    (out / name).unlink()
    os.mkfifo(out / name)
    program = (
        "import sys; from dinov2_attn import AttentionDataset, errors\n"
        "try: dataset = AttentionDataset(sys.argv[1]); dataset[0]; dataset.unreadable()\n"
        "except errors.UnreadableFileError: pass\n"
        "else: raise SystemExit('no error')\n"
    )
    # In a process of its own: what waits for a pipe in a library stops the whole process.
    subprocess.run([sys.executable, "-c", program, str(out)], check=True, timeout=60)


def test_without_pandas_the_error_names_the_extra(out):
    program = (
        "import sys; sys.modules['pandas'] = None\n"
        "from dinov2_attn import AttentionDataset, errors\n"
        "dataset = AttentionDataset(sys.argv[1])\n"
        "assert len(list(dataset.entries())) == 23\n"
        "try: dataset.frame()\n"
        "except errors.UnavailableError as error: assert 'dinov2-attn[pandas]' in error.hint\n"
        "else: raise SystemExit('no error')\n"
    )
    run = [sys.executable, "-c", program, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(dinov2_attn.__file__).parents[1])}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
