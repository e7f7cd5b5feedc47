"""Maps as zarr arrays: the same content, as resumable as safetensors."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
import timm
import torch
from torch.utils.data import DataLoader

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.extraction.storages import encoded, opened
from dinov2_attn.errors import InvalidInputError
from tests.support.extraction import build, draw, files_of, index_of, photographs
from tests.support.subprocesses import python
from tests.support.tolerances import assert_close, assert_same_bits

zarr = pytest.importorskip("zarr", minversion="3", reason="pip install 'dinov2-attn[zarr]'")
pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights


@pytest.fixture
def model(first):
    return build(first).eval()


@pytest.fixture
def images(tmp_path):
    return photographs(tmp_path / "in", 9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": "mean", "dtype": "float16"},
        {"grid": (2, 3), "queries": ["cls", (0, 1)], "layers": None},
        {"facets": ("key", "value"), "artifacts": True},
    ],
    ids=str,
)
def test_rows_are_those_of_safetensors(model, images, tmp_path, options):
    stored = []
    for form in ("safetensors", "zarr"):
        out = tmp_path / form
        extract(model, images, out, shard_size=4, format=form, **options)
        stored.append(AttentionDataset(out))
    one, other = stored
    assert len(one) == len(other) == 9
    for i in range(9):
        for key, value in one[i].items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(other[i][key], value)
            else:
                assert other[i][key] == value
        assert_same_bits(list(other.maps(i).weights), list(one.maps(i).weights))
    lines = [entry["checksum"] for entry in index_of(tmp_path / "safetensors")]
    assert [entry["checksum"] for entry in index_of(tmp_path / "zarr")] == lines
    assert {entry["shard"] for entry in other.entries()} == {
        f"shards/{i:05d}.zarr.zip" for i in range(3)
    }


def test_the_readme_reads_them_without_the_package(model, images, tmp_path, monkeypatch):
    extract(model, images, tmp_path / "out", shard_size=4, format="zarr")
    monkeypatch.chdir(tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import pathlib, zarr.*?)```", readme, re.S)
    names = {}
    exec(code, names)
    assert names["maps"].ndim == 6
    assert len(names["numbers"]) == names["maps"].shape[0]
    assert names["maps"].metadata.dimension_names[:3] == ("image", "layer", "head")


def test_a_run_that_was_interrupted_ends_with_the_same_bytes(model, images, tmp_path):
    extract(model, images, tmp_path / "whole", shard_size=2, format="zarr")
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    model.blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(model, images, tmp_path / "out", shard_size=2, format="zarr")
    hook.remove()
    model.blocks[0]._forward_pre_hooks.clear()
    assert not (tmp_path / "out" / "index.jsonl").exists()
    done = extract(model, images, tmp_path / "out", shard_size=2, format="zarr")
    assert done.seen < 9
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_process_that_is_killed_leaves_what_another_one_finishes(imported, tmp_path):
    for i in range(40):
        draw(tmp_path / "in" / f"{i:02}.png", (98, 98), i)
    arguments = ["extract", str(tmp_path / "in"), "--model", "demo", "--shard-size", "2"]
    arguments += ["--workers", "0", "--format", "zarr", "--index", "jsonl", "-q", "-o"]
    code = "import sys; from dinov2_attn.apps.cli.main import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([sys.executable, "-c", code, *arguments, str(tmp_path / "out")]) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "shards" / "00002.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.kill()
    assert not (tmp_path / "out" / "index.jsonl").exists()
    for name in ("out", "whole"):
        assert main([*arguments, str(tmp_path / name)]) == 0
    files = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "out").keys() == files.keys()
    found, whole = AttentionDataset(tmp_path / "out"), AttentionDataset(tmp_path / "whole")
    for i in range(40):  # another process may have another number of threads
        assert_close(found[i]["maps"], whole[i]["maps"])


@pytest.mark.parametrize("verify", [False, True])
def test_what_was_damaged_is_written_again(model, images, tmp_path, verify):
    out = tmp_path / "out"
    options = {"shard_size": 3, "format": "zarr", "verify": verify}
    extract(model, images, out, **options)
    before = files_of(out)
    first, second, third = sorted((out / "shards").glob("*.zarr.zip"))
    first.write_bytes(first.read_bytes()[:-40])
    second.unlink()
    if verify:
        content = bytearray(third.read_bytes())
        at = content.index(b"0/maps/c/") + 60
        content[at : at + 8] = bytes(8)
        third.write_bytes(content)
    assert extract(model, images, out, **options).written == (3 if verify else 2)
    assert files_of(out) == before


def test_equal_tensors_give_equal_bytes():
    tensors = {"3.maps": torch.rand(2, 3, 1, 2, 2), "3.prefix": torch.rand(2, 3, 1, 0)}
    tensors |= {"12.maps": torch.rand(2, 3, 1, 4, 2), "12.prefix": torch.rand(2, 3, 1, 0)}
    assert encoded("zarr", tensors, {"a": "b"}) == encoded("zarr", tensors, {"a": "b"})
    assert encoded("zarr", {}, {"a": "b"})


def test_tensors_without_numbers_and_shards_without_images(tmp_path):
    tensors = {"3.maps": torch.rand(2, 3, 1, 2, 2), "3.prefix": torch.rand(2, 3, 1, 0)}
    path = tmp_path / "a.zarr.zip"
    path.write_bytes(encoded("zarr", tensors, {"a": "b"}))
    with opened(path) as shard:
        assert shard.metadata() == {"a": "b"}
        assert set(shard.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert_same_bits(shard.get_tensor(name), tensor)
    path.write_bytes(encoded("zarr", {}, {}))
    with opened(path) as shard:
        assert list(shard.keys()) == []


def test_images_that_fail_have_no_row(model, tmp_path):
    for i in range(4):
        draw(tmp_path / "in" / f"{i}.png", (4, 6), i)
    for i in (0, 1):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"no image")
    done = extract(model, tmp_path / "in", tmp_path / "out", shard_size=2, format="zarr")
    assert (done.unreadable, done.shards) == (2, 2)
    found = AttentionDataset(tmp_path / "out")
    assert [row["number"] for row in (found[0], found[1])] == [2, 3]


def test_a_model_without_cls_has_an_empty_prefix(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, class_token=False, global_pool="avg"
    ).eval()
    draw(tmp_path / "a.png", (32, 32), 0)
    extract(model, tmp_path / "a.png", tmp_path / "out", queries=[(0, 0)], format="zarr")
    assert AttentionDataset(tmp_path / "out")[0]["prefix"].shape[-1] == 0


def test_workers_of_a_loader_open_their_own(model, images, tmp_path):
    extract(model, images, tmp_path / "out", grid=(2, 2), shard_size=4, format="zarr")
    stored = AttentionDataset(tmp_path / "out")
    stored[0]  # this process has one open
    for context in ("fork", "spawn"):
        loader = DataLoader(
            stored, batch_size=3, num_workers=2, multiprocessing_context=context, timeout=60
        )
        assert sum(len(batch["maps"]) for batch in loader) == 9


def test_the_program_writes_both(imported, weights, tmp_path):
    draw(tmp_path / "a.png", (28, 42), 0)
    options = ["--weights", str(weights), "--format", "zarr", "-q"]
    assert main(["extract", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), *options]) == 0
    assert (tmp_path / "out" / "shards" / "00000.zarr.zip").is_file()


def test_another_format_is_another_extraction(model, images, tmp_path):
    extract(model, images, tmp_path / "out", format="zarr")
    with pytest.raises(InvalidInputError, match='format: "zarr", now "safetensors"'):
        extract(model, images, tmp_path / "out")
    with pytest.raises(InvalidInputError, match="float32 or float16"):
        extract(model, images, tmp_path / "b", format="zarr", dtype="bfloat16")
    with pytest.raises(InvalidInputError, match="safetensors or zarr"):
        extract(model, images, tmp_path / "b", format="npz")


def test_without_zarr_the_error_names_the_extra(tmp_path):
    code = """
import sys
sys.modules["zarr"] = None
from dinov2_attn.apps.extraction.storages import check_format
try:
    check_format("zarr", "float32")
except Exception as error:
    print(error.hint)
"""
    done = python("-c", code, cwd=tmp_path)
    assert "pip install 'dinov2-attn[zarr]'" in done.stdout, done.stderr


def test_shards_are_not_called_damaged_where_zarr_is_missing(model, images, tmp_path):
    extract(model, images, tmp_path / "out", format="zarr")
    code = """
import sys
sys.modules["zarr"] = None
import dinov2_attn
try:
    dinov2_attn.AttentionDataset("out")[0]
except dinov2_attn.errors.UnavailableError as error:
    print(error.hint)
"""
    done = python("-c", code, cwd=tmp_path)
    assert "pip install 'dinov2-attn[zarr]'" in done.stdout, done.stderr
