"""The index of an extraction as a Parquet file."""

from __future__ import annotations

import json
import math
import sys

import pytest

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.extraction import parquet as module
from dinov2_attn.errors import InvalidInputError
from tests.support.extraction import build, draw, photographs
from tests.support.subprocesses import python

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'dinov2-attn[parquet]'")
pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights


@pytest.fixture
def model(first):
    return build(first).eval()


@pytest.fixture
def images(tmp_path):
    return photographs(tmp_path / "in", 7)


def test_it_has_the_columns_of_frame(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)  # several row groups
    out = tmp_path / "out"
    extract(model, images, out, layers=None, artifacts=True, index="parquet", shard_size=2)
    file = parquet.ParquetFile(out / "index.parquet")
    assert file.num_row_groups == 3
    table = file.read().to_pylist()
    entries = list(AttentionDataset(out).entries())
    assert len(table) == len(entries) == 7
    for row, entry in zip(table, entries, strict=True):
        assert (row["path"], row["number"]) == (entry["path"], entry["number"])
        assert [row["height"], row["width"]] == entry["size"]
        assert [row["rows"], row["columns"]] == entry["grid"]
        for layer in range(3):
            assert row[f"entropy_{layer}"] == entry["entropy"][layer]
        assert row["artifacts"] == len(entry["artifacts"]["tokens"])
        assert row["checksum"] == entry["checksum"]
    about = json.loads(file.schema_arrow.metadata[b"dinov2_attn"])
    assert about["tensors"]["layers"] == [0, 1, 2]


def test_pandas_reads_the_same_table(model, images, tmp_path):
    pandas = pytest.importorskip("pandas", reason="pip install 'dinov2-attn[pandas]'")
    extract(model, images, tmp_path / "out", index="parquet")
    found = pandas.read_parquet(tmp_path / "out" / "index.parquet")
    expected = AttentionDataset(tmp_path / "out").frame()
    assert list(found.columns) == list(expected.columns)
    assert list(found["path"]) == list(expected["path"])
    assert found["artifacts"].isna().all()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")
def test_a_name_of_bytes_that_are_no_text(model, tmp_path):
    pytest.importorskip("pandas", reason="pip install 'dinov2-attn[pandas]'")
    draw(tmp_path / "a.png", (4, 6), 0)
    (tmp_path / "in\udcff").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "in\udcff" / "b\udcfe.png")
    extract(model, tmp_path / "in\udcff", tmp_path / "out", index="parquet")
    dataset = AttentionDataset(tmp_path / "out")
    (row,) = parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert (row["source"], row["path"]) == (r"in\udcff", r"b\udcfe.png")
    assert list(dataset.frame()["path"]) == [r"b\udcfe.png"]
    assert dataset[0]["path"] == "b\udcfe.png"


def test_a_finished_extraction_gets_one_and_keeps_it_true(model, images, tmp_path):
    out = tmp_path / "out"
    broken = images / "b" / "001.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no image")
    extract(model, images, out, shard_size=3)
    assert not (out / "index.parquet").exists()
    done = extract(model, images, out, shard_size=3, index="parquet")
    assert (done.seen, parquet.read_metadata(out / "index.parquet").num_rows) == (0, 6)
    broken.write_bytes(content)
    extract(model, images, out, shard_size=3, retry=True)  # without asking for it again
    assert parquet.read_metadata(out / "index.parquet").num_rows == 7


def test_the_bytes_are_those_of_every_run(model, images, tmp_path):
    for name in ("a", "b"):
        extract(model, images, tmp_path / name, index="parquet")
    assert (tmp_path / "a" / "index.parquet").read_bytes() == (
        tmp_path / "b" / "index.parquet"
    ).read_bytes()


def test_numbers_that_are_missing_are_null(model, tmp_path):
    draw(tmp_path / "a.png", (4, 6), 0)
    model.blocks[2].attn.qkv.weight.data.fill_(math.nan)
    extract(model, tmp_path / "a.png", tmp_path / "out", index="parquet", layers=[0, 2])
    (row,) = parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert row["entropy_2"] is None
    assert row["entropy_0"] > 0


def test_an_extraction_without_maps_has_an_empty_table(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    extract(model, tmp_path / "a.png", tmp_path / "out", index="parquet")
    assert parquet.read_table(tmp_path / "out" / "index.parquet").num_rows == 0


def test_the_program_writes_one(imported, weights, tmp_path):
    draw(tmp_path / "a.png", (28, 42), 0)
    options = ["--weights", str(weights), "--index", "parquet", "-q"]
    assert main(["extract", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), *options]) == 0
    assert parquet.read_metadata(tmp_path / "out" / "index.parquet").num_rows == 1


def test_another_index_is_refused(model, images, tmp_path):
    with pytest.raises(InvalidInputError, match="'jsonl' or 'parquet'"):
        extract(model, images, tmp_path / "out", index="csv")


def test_without_pyarrow_the_error_names_the_extra(tmp_path):
    code = """
import sys
sys.modules["pyarrow"] = None
from dinov2_attn.apps.extraction.parquet import check_index
try:
    check_index("parquet")
except Exception as error:
    print(error.hint)
"""
    done = python("-c", code, cwd=tmp_path)
    assert "pip install 'dinov2-attn[parquet]'" in done.stdout, done.stderr
