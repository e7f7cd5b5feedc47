"""``dinov2-attn extract``, as it is typed."""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile

import pytest
import torch

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.demo.load import PATH as DEMO
from dinov2_attn.apps.viz.images import load_image
from tests.support.extraction import draw, files_of, index_of, stored
from tests.support.tolerances import assert_close, assert_same_bits

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("imported")


@pytest.fixture
def source(tmp_path):
    for i, size in enumerate([(42, 42), (42, 70), (70, 42), (42, 42)]):
        draw(tmp_path / "in" / f"{i}.png", size, i)
    return tmp_path / "in"


def run(*arguments):
    return main(["extract", *map(str, arguments), "--weights", str(DEMO), "--workers", "0"])


def test_a_folder_is_written(source, tmp_path, capsys):
    assert run(source, "-o", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "4 images, 0 of them unreadable, in 1 shard;" in said.out
    assert said.err == ""  # no bar outside of a terminal
    assert f"wrote {tmp_path / 'out' / 'README.md'}: what the files hold" in said.out
    assert f"in Python: dinov2_attn.AttentionDataset('{tmp_path / 'out'}')" in said.out
    assert (
        f"next: dinov2-attn summary {tmp_path / 'out'} -o sheet.html --images {source}\n"
        in said.out
    )
    shapes = [tuple(maps.shape) for _, maps, _ in stored(tmp_path / "out")]
    assert shapes == [(1, 2, 1, 3, 3), (1, 2, 1, 3, 5), (1, 2, 1, 5, 3), (1, 2, 1, 3, 3)]
    about = json.loads((tmp_path / "out" / "extraction.json").read_text())
    assert about["model"]["name"].startswith("ViT-128x4/14")
    assert "fc49f49" in about["model"]["code"]


def test_every_option_is_heard(source, tmp_path):
    options = "--layers all --queries #0 0,3 --heads mean --dtype float16 --grid 2,4 --artifacts"
    options += " --batch-size 2 --shard-size 3 --max-pixels 2900 --image-size 28 56"
    options += " --facets key value --statistics entropy,centroid"
    options += " --range 0,200 --mean 0.5 --std 0.1,0.2,0.3"
    assert run(source, "-o", tmp_path / "out", *options.split()) == 1  # some have more pixels
    about = json.loads((tmp_path / "out" / "extraction.json").read_text())["options"]
    assert about == {
        "layers": [0, 1, 2, 3],
        "queries": ["#0", "0,3"],
        "heads": "mean",
        "dtype": "float16",
        "format": "safetensors",
        "grid": [2, 4],
        "artifacts": True,
        "image_size": [28, 56],
        "max_pixels": 2900,
        "batch_size": 2,
        "shard_size": 3,
        "reading": {
            "channels": 3,
            "range": [0, 200],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.1, 0.2, 0.3],
        },
        "facets": ["key", "value"],
        "statistics": ["entropy", "centroid"],
    }
    for entry, maps, prefix in stored(tmp_path / "out"):
        assert maps.shape == (4, 2, 2, 4)
        assert prefix.shape == (4, 2, 1)
        assert maps.dtype == torch.float16
        assert entry["artifacts"]["grid"] == [2, 4]
    assert len(index_of(tmp_path / "out")) == 2


def test_images_behind_the_image_size_are_sources(source, tmp_path):
    assert run("-o", tmp_path / "out", "--image-size", "28", source) == 0
    assert len(index_of(tmp_path / "out")) == 4


def test_folder_list_and_tar_hold_the_same_maps(source, tmp_path):
    names = [f"{i}.png" for i in range(4)]
    (tmp_path / "list.txt").write_text("".join(f"in/{name}\n" for name in names))
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in names:
            tar.add(source / name, arcname=name)
    for given in (source, tmp_path / "list.txt", tmp_path / "images.tar"):
        assert run(given, "-o", tmp_path / f"out-{given.name}") == 0
    folder, of_list, of_tar = (
        list(stored(tmp_path / f"out-{name}")) for name in ("in", "list.txt", "images.tar")
    )
    for one, *others in zip(folder, of_list, of_tar, strict=True):
        for entry, *tensors in others:
            assert entry["checksum"] == one[0]["checksum"]
            for ours, theirs in zip(tensors, one[1:], strict=True):
                assert_same_bits(ours, theirs)


@pytest.mark.parametrize("strict", [False, True], ids=["goes on", "strict"])
def test_what_cannot_be_read_is_the_exit_status(source, tmp_path, strict, caplog):
    (source / "broken.png").write_bytes(b"no image")
    status = run(source, "-o", tmp_path / "out", *["--strict"] * strict)
    assert status == (2 if strict else 1)
    if strict:
        assert "broken.png" in caplog.text
    else:
        assert [e["path"] for e in index_of(tmp_path / "out", "unreadable.jsonl")] == ["broken.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode, as above")
def test_names_that_are_no_text_are_printed_all_the_same(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no image")
    for options in (["--dry-run"], []):
        assert run(tmp_path / "in", "-o", tmp_path / "out", *options) == 1
    assert r"caf\udce9.png" in capsys.readouterr().out
    (entry,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert os.fsencode(entry["path"]) == b"caf\xe9.png"


def test_a_dry_run_names_twenty_that_cannot_be_read(tmp_path, capsys):
    for i in range(23):
        draw(tmp_path / "in" / f"{i:02}.png", (1, 9), i)
    run(tmp_path / "in", "-o", tmp_path / "out", "--dry-run")
    said = capsys.readouterr().out
    assert said.count("expected an image of at least one patch") == 20
    assert "and 3 more" in said


def test_a_dry_run_prints_everything_and_writes_nothing(source, tmp_path, capsys):
    (source / "broken.png").write_bytes(b"no image")
    assert run(source, "-o", tmp_path / "out", "--shard-size", 2, "--dry-run") == 1
    assert not (tmp_path / "out").exists()
    promised = capsys.readouterr().out
    assert "5 images in 3 shards" in promised
    assert "passed over: 0 images in 0 shards" in promised
    assert "unreadable by their headers: 1\n  broken.png: expected a complete image" in promised
    size = int(re.search(r"maps of 4 images, ([\d,]+) bytes", promised)[1].replace(",", ""))

    run(source, "-o", tmp_path / "out", "--shard-size", 2)
    numbers = sum(maps.numel() + prefix.numel() for _, maps, prefix in stored(tmp_path / "out"))
    assert size == 4 * numbers
    (tmp_path / "out" / "shards" / "00001.jsonl").unlink()
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    run(source, "-o", tmp_path / "out", "--shard-size", 2, "--dry-run")
    assert files_of(tmp_path / "out") == before
    said = capsys.readouterr().out
    assert "passed over: 3 images in 2 shards" in said
    assert "maps of 2 images" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--queries", "clss"], "one of the words registers, patches, all; found 'clss'"),
        (
            ["--queries", "cls", "1,x"],
            "#POSITION, or one of the words registers, patches, all; found",
        ),
        (["--layers", "x"], "expected blocks"),
        (["--grid", "3"], "expected a height and a width"),
        (["--grid", "3,0"], "expected a whole number above 0"),
        (["--workers", "-1"], "expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_are_explained(source, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit, match="2"):
        run(source, "-o", tmp_path / "out", *options)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "4"], "Expected blocks between -4 and 3"),
        (["--queries", "registers"], "a model without"),
        (["--image-size", "0"], "--image-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_model_does_not_have_is_an_error(source, tmp_path, caplog, options, said):
    assert run(source, "-o", tmp_path / "out", *options) == 2
    assert said in caplog.text
    assert not (tmp_path / "out").exists()


def test_no_source_is_an_error(tmp_path, caplog):
    assert run("-o", tmp_path / "out") == 2
    assert "Expected a source of images" in caplog.text


def test_random_weights_are_said_to_be_random(source, tmp_path, caplog):
    arguments = ["--random-weights", "--image-size", "28", "--workers", "0"]
    assert main(["extract", str(source), "-o", str(tmp_path / "out"), *arguments]) == 0
    about = json.loads((tmp_path / "out" / "extraction.json").read_text())["model"]
    assert about["warning"] == "random weights: these maps carry no meaning"
    assert "random weights" in about["name"]


def test_maps_are_those_of_the_python_call(source, tmp_path):
    import dinov2_attn
    from dinov2_attn.apps.demo.load import load_demo_model

    run(source, "-o", tmp_path / "out")
    with dinov2_attn.install():
        model = load_demo_model()
        for entry, maps, _ in stored(tmp_path / "out"):
            images = load_image(source / entry["path"], 14).tensor[None]
            expected = dinov2_attn.attention_maps(
                model, images, layers=1, queries="cls"
            ).patch_maps()[0]
            assert_close(maps, expected, size=1.0)


def test_a_name_cannot_steer_the_terminal(source, tmp_path, capsys):
    (source / "red\x1b[31m.png").write_bytes(b"no image")
    assert run(source, "-o", tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "red\\x1b[31m.png: expected a complete image file" in said
