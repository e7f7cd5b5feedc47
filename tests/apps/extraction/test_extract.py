"""``extract``: what it stores is the attention of each image, and what it says of it is true."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dinov2_attn
from dinov2_attn import artifact_tokens, extract
from dinov2_attn.apps.extraction.decode import Picture
from dinov2_attn.apps.extraction.items import list_items
from dinov2_attn.apps.extraction.worker import WAITING, WORTH_A_WORKER, Buckets, decoded
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import (
    InvalidInputError,
    OutOfRangeError,
    SuspiciousArtifactsWarning,
    UnavailableError,
    UnreadableFileError,
    UnwritableOutputError,
)
from dinov2_attn.maps.resample import resample
from tests.support.extraction import SIZES, build, draw, files_of, index_of, photographs, stored
from tests.support.tolerances import assert_close, assert_same_bits


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("images") / "in")


def alone(model, path, **asked):
    """The weights of one image by itself, ``(layers, …, N)``, and its grid."""
    tensor = load_image(path, 2).tensor[None]
    with torch.no_grad():
        weights = model.get_self_attention(tensor, **asked)
    return torch.stack(weights, 1)[0], (tensor.shape[2] // 2, tensor.shape[3] // 2)


@given(
    layers=st.sampled_from([1, 2, None, [0], [-1, 0]]),
    queries=st.sampled_from(["cls", "patches", None, 0, [0, 3], [-1]]),
    heads=st.sampled_from([None, "mean"]),
    grid=st.sampled_from([None, (2, 2), (3, 1)]),
    batch_size=st.integers(1, 5),
    shard_size=st.integers(1, 13),
)
def test_each_image_has_the_attention_it_has_alone(
    model, images, tmp_path_factory, layers, queries, heads, grid, batch_size, shard_size
):
    out = tmp_path_factory.mktemp("out")
    options = {"layers": layers, "queries": queries, "heads": heads, "grid": grid}
    done = extract(model, images, out, **options, batch_size=batch_size, shard_size=shard_size)
    assert (done.images, done.unreadable, done.seen) == (12, 0, 12)
    assert done.written == done.shards == math.ceil(12 / shard_size)
    found = list(stored(out))
    assert [entry["number"] for entry, *_ in found] == list(range(12))
    for entry, maps, prefix in found:
        weights, (height, width) = alone(
            model, images / entry["path"], n=layers, queries=queries, heads=heads
        )
        assert entry["grid"] == [height, width]
        patches = weights[..., 1:].unflatten(-1, (height, width))
        assert_close(maps, patches if grid is None else resample(patches, grid), size=1.0)
        assert_close(prefix, weights[..., :1], size=1.0)
        assert_close(maps.sum((-2, -1)) + prefix.sum(-1), torch.ones(maps.shape[:-2]), size=1.0)


def test_every_copy_of_the_code_with_its_registers(models, images, tmp_path):
    registers = {"num_register_tokens": 3} if models.has_registers else {}
    model = build(models, **registers)
    extract(model, images, tmp_path, layers=None, queries="patches")
    for entry, maps, prefix in stored(tmp_path):
        weights, grid = alone(model, images / entry["path"], queries="patches")
        prefix_length = 1 + sum(registers.values())
        assert prefix.shape[-1] == prefix_length
        assert_close(maps, weights[..., prefix_length:].unflatten(-1, grid), size=1.0)
        assert entry["prefix_mass"] == pytest.approx(
            weights[..., :prefix_length].sum(-1).mean((1, 2)).tolist(), abs=1e-6
        )


def test_the_index_lists_what_is_stored(model, images, tmp_path):
    extract(model, images, tmp_path, shard_size=5)
    about = json.loads((tmp_path / "extraction.json").read_text())
    assert about["options"]["layers"] == [2]
    assert about["source"]["images"] == 12
    assert about["model"]["warning"] is None
    for entry, maps, prefix in stored(tmp_path):
        path = images / entry["path"]
        assert entry["source"] == "in"
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        content = maps.numpy().tobytes() + prefix.numpy().tobytes()
        assert entry["checksum"] == hashlib.sha256(content).hexdigest()
        with Image.open(path) as image:
            assert entry["size"] == [image.height, image.width]
        assert entry["shard"] == f"shards/{entry['number'] // 5:05}.safetensors"
        assert entry["artifacts"] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_are_rounded_once(model, images, tmp_path, dtype):
    extract(model, images, tmp_path / "wide")
    extract(model, images, tmp_path / "narrow", dtype=str(dtype).removeprefix("torch."))
    pairs = zip(stored(tmp_path / "wide"), stored(tmp_path / "narrow"), strict=True)
    for (_, maps, prefix), (_, narrow_maps, narrow_prefix) in pairs:
        assert_same_bits(narrow_maps, maps.to(dtype))
        assert_same_bits(narrow_prefix, prefix.to(dtype))


def test_a_model_of_half_precision_runs_in_half_precision(grafted, images, tmp_path):
    model = build(grafted).bfloat16()
    extract(model, images, tmp_path)
    for entry, maps, prefix in stored(tmp_path):
        tensor = load_image(images / entry["path"], 2).tensor[None].bfloat16()
        with torch.no_grad():
            weights = model.get_last_self_attention(tensor, queries="cls")[0]
        whole = torch.cat([prefix[0], maps[0].flatten(-2)], -1)
        assert_close(whole, weights, dtype=torch.bfloat16, size=1.0)
        assert maps.dtype == torch.float32


def test_outliers_are_those_of_artifact_tokens(model, tmp_path):
    draw(tmp_path / "in" / "a.png", (12, 16), 0)
    flat = np.full((12, 16, 3), 90, dtype=np.uint8)
    flat[4:6, 6:8] = 255
    Image.fromarray(flat).save(tmp_path / "in" / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SuspiciousArtifactsWarning)  # the index says it
        extract(model, tmp_path / "in", tmp_path / "out", artifacts=True)
    for entry in index_of(tmp_path / "out"):
        images = load_image(tmp_path / "in" / entry["path"], 2).tensor[None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SuspiciousArtifactsWarning)
            (expected,) = artifact_tokens(model, images).report()
        ours = entry["artifacts"]
        assert ours["layer"] == expected["layer"]
        assert ours["threshold"] == pytest.approx(expected["threshold"], rel=1e-5)
        places = [(token["row"], token["col"]) for token in expected["tokens"]]
        assert [(token["row"], token["col"]) for token in ours["tokens"]] == places


@given(layers=st.sampled_from([1, None, [0], [-1, 1]]), queries=st.sampled_from(["cls", None]))
def test_outliers_change_no_map(model, images, tmp_path_factory, layers, queries):
    """They are found in the same pass, whose blocks are asked on the way."""
    out = tmp_path_factory.mktemp("out")
    for artifacts in (False, True):
        asked = {"layers": layers, "queries": queries, "artifacts": artifacts}
        extract(model, images, out / str(artifacts), **asked)
    pairs = zip(stored(out / "False"), stored(out / "True"), strict=True)
    for (_, maps, prefix), (entry, maps_too, prefix_too) in pairs:
        assert_close(maps_too, maps, size=1.0)
        assert_close(prefix_too, prefix, size=1.0)
        assert entry["artifacts"] is not None


def test_a_query_that_is_not_there_is_a_reason_with_outliers_too(model, images, tmp_path):
    plain = extract(model, images, tmp_path / "plain", queries=[7])
    assert 0 < plain.unreadable < 12
    done = extract(model, images, tmp_path / "out", queries=[7], artifacts=True)
    assert done.unreadable == plain.unreadable


def test_a_patch_has_its_own_position_in_each_grid(model, images, tmp_path):
    """Images of 2 × 5, 5 × 2, 3 × 3 patches and others: a row of the full matrix in each."""
    extract(model, images, tmp_path / "all", queries=None)
    asked = ["0,1", (1, 0), "cls", "#-1", "patches"]
    done = extract(model, images, tmp_path / "some", queries=asked, artifacts=True)
    assert done.unreadable == 0
    about = json.loads((tmp_path / "some" / "extraction.json").read_text())["options"]
    assert about["queries"] == ["0,1", "1,0", "cls", "#-1", "patches"]
    grids = set()
    for full, few in zip(stored(tmp_path / "all"), stored(tmp_path / "some"), strict=True):
        (entry, maps, prefix), (_, some, some_prefix) = full, few
        height, width = entry["grid"]
        rows = [1 + 1, 1 + width, 0, height * width, *range(1, 1 + height * width)]
        assert_close(some, maps[:, :, rows], size=1.0)
        assert_close(some_prefix, prefix[:, :, rows], size=1.0)
        grids.add((height, width))
    assert len(grids) > 2


def test_a_patch_that_an_image_does_not_have_is_a_reason(model, images, tmp_path):
    out = tmp_path / "out"
    preview = extract(model, images, out, queries=["cls", "0,4"], dry_run=True)
    done = extract(model, images, out, queries=["cls", "0,4"])
    wide = [entry for entry in index_of(out) if entry["grid"][1] >= 5]
    assert 0 < len(wide) == len(index_of(out)) == done.images - done.unreadable
    refused = index_of(out, "unreadable.jsonl")
    assert len(refused) == len(preview.unreadable) > 0
    for line in refused:
        assert "expected a patch in the grid of" in line["reason"]
        assert line["stage"] == "pass"


@pytest.mark.parametrize(
    ("queries", "rows"),
    [
        (slice(0, 3), [0, 1, 2]),
        ("#1:3", [1, 2]),
        (slice(None, None, -1), slice(None)),
        ("0,1", [2]),
        ([0, 2], [0, 2]),
        (2, [2]),
    ],
    ids=repr,
)
def test_queries_are_the_same_in_python_and_in_text(model, images, tmp_path, queries, rows):
    extract(model, images, tmp_path / "all", queries=None)
    extract(model, images, tmp_path / "some", queries=queries)
    for full, few in zip(stored(tmp_path / "all"), stored(tmp_path / "some"), strict=True):
        expected = full[1].flip(2) if isinstance(rows, slice) else full[1][:, :, rows]
        assert_close(few[1], expected, size=1.0)


def test_the_image_size_is_that_of_the_other_commands(model, tmp_path):
    draw(tmp_path / "in" / "a.png", (30, 22), 0)
    for size in (8, (6, 10)):
        out = tmp_path / f"out-{size}"
        extract(model, tmp_path / "in", out, image_size=size)
        ((entry, maps, _),) = stored(out)
        tensor = load_image(tmp_path / "in" / "a.png", 2, size).tensor[None]
        with torch.no_grad():
            weights = model.get_last_self_attention(tensor, queries="cls")
        assert entry["size"] == [30, 22]
        assert entry["grid"] == [side // 2 for side in tensor.shape[2:]]
        assert_close(maps[0].flatten(-2), weights[0, ..., 1:], size=1.0)


# What cannot be read


@pytest.fixture
def damaged(tmp_path):
    """A folder in which every third image is none, for four reasons."""
    folder = photographs(tmp_path / "damaged", 8)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "empty.png").write_bytes(b"")
    whole = draw(folder / "short.png", (9, 9), 0).read_bytes()
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    draw(folder / "small.png", (1, 9), 0)
    return folder


def test_what_cannot_be_read_is_listed_and_the_run_goes_on(model, damaged, tmp_path):
    done = extract(model, damaged, tmp_path / "out", shard_size=5)
    assert (done.images, done.unreadable) == (12, 4)
    refused = {e["path"]: e["reason"] for e in index_of(tmp_path / "out", "unreadable.jsonl")}
    assert set(refused) == {"broken.jpg", "empty.png", "short.png", "small.png"}
    assert "cannot identify image file 'broken.jpg'" in refused["broken.jpg"]
    assert "of 1 × 9 (height × width)" in refused["small.png"]
    good = [entry["path"] for entry in index_of(tmp_path / "out")]
    assert len(good) == 8
    assert not set(good) & set(refused)


def test_reasons_are_the_same_in_every_run(model, damaged, tmp_path):
    """No place in memory is in them, as there is in what Pillow says."""
    for out in ("one", "two"):
        extract(model, damaged, tmp_path / out, shard_size=5)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_shard_without_readable_images_is_a_shard(model, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"")
    done = extract(model, tmp_path, tmp_path / "out", shard_size=2)
    assert (done.images, done.unreadable, done.shards) == (3, 3, 2)
    again = extract(model, tmp_path, tmp_path / "out", shard_size=2)
    assert (again.seen, again.unreadable) == (0, 3)
    assert index_of(tmp_path / "out") == []


def test_strict_stops_at_the_first(model, damaged, tmp_path):
    with pytest.raises(
        UnreadableFileError, match=r"(?s)since the run is strict\.\nFound .*\.(png|jpg)"
    ):
        extract(model, damaged, tmp_path / "out", strict=True, shard_size=4)
    assert not (tmp_path / "out" / "index.jsonl").exists()


def test_strict_stops_at_what_an_earlier_run_passed_over(model, damaged, tmp_path):
    extract(model, damaged, tmp_path / "out")
    with pytest.raises(UnreadableFileError, match="since the run is strict"):
        extract(model, damaged, tmp_path / "out", strict=True)


def test_a_query_that_a_small_image_lacks_is_a_reason(model, images, tmp_path):
    done = extract(model, images, tmp_path, queries=[0, 7])
    small = sum(math.prod(side // 2 for side in SIZES[i % len(SIZES)]) < 7 for i in range(12))
    assert 0 < done.unreadable == small < 12
    for entry in index_of(tmp_path, "unreadable.jsonl"):
        assert "expected a token between" in entry["reason"]
    with pytest.raises(UnreadableFileError, match="expected a token between"):
        extract(model, images, tmp_path / "strict", queries=[0, 7], strict=True)


def test_more_pixels_than_allowed_are_a_reason(model, images, tmp_path):
    done = extract(model, images, tmp_path, max_pixels=36)
    assert done.unreadable == sum(math.prod(SIZES[i % len(SIZES)]) > 36 for i in range(12))


def test_a_fixed_image_is_read_with_retry(model, damaged, tmp_path):
    extract(model, damaged, tmp_path / "out", shard_size=3)
    before = files_of(tmp_path / "out")
    draw(damaged / "broken.jpg", (6, 6), 3)
    assert extract(model, damaged, tmp_path / "out", shard_size=3).seen == 0
    assert files_of(tmp_path / "out") == before

    bad = {e["number"] // 3 for e in index_of(tmp_path / "out", "unreadable.jsonl")}
    promised = extract(model, damaged, tmp_path / "out", shard_size=3, retry=True, dry_run=True)
    assert promised.finished == 4 - len(bad)
    done = extract(model, damaged, tmp_path / "out", shard_size=3, retry=True)
    assert (done.written, done.unreadable) == (len(bad), 3)
    extract(model, damaged, tmp_path / "again", shard_size=3)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_a_dry_run_knows_what_small_images_lack(model, images, tmp_path):
    promised = extract(model, images, tmp_path / "out", queries=[0, 7], dry_run=True)
    done = extract(model, images, tmp_path / "out", queries=[0, 7])
    assert len(promised.unreadable) == done.unreadable > 0
    assert "expected a token between" in promised.unreadable[0].reason
    numbers = sum(m.numel() + p.numel() for _, m, p in stored(tmp_path / "out"))
    assert promised.bytes == 4 * numbers


# Into which folder


def test_a_second_run_has_nothing_to_do(model, images, tmp_path):
    first = extract(model, images, tmp_path, shard_size=5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*")}
    files = files_of(tmp_path)
    again = extract(model, images, tmp_path, shard_size=5)
    assert (first.written, again.written, again.seen) == (3, 0, 0)
    assert again.shards == 3
    assert files_of(tmp_path) == files
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*")} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 2}, r"layers: \[2\], now \[1, 2\]"),
        ({"queries": None}, r'queries: \["cls"\], now \["all"\]'),
        ({"heads": "mean"}, r'heads: null, now "mean"'),
        ({"dtype": "float16"}, r'dtype: "float32", now "float16"'),
        ({"grid": (2, 2)}, r"grid: null, now \[2, 2\]"),
        ({"artifacts": True}, "artifacts: false, now true"),
        ({"image_size": 8}, "image_size: null, now 8"),
        ({"max_pixels": 99}, "max_pixels: null, now 99"),
        ({"batch_size": 3}, "batch_size: 16, now 3"),
        ({"shard_size": 5}, r"shard_size: \d+, now 5"),
        ({"name": "other"}, 'name: .*, now "other"'),
        ({"random": True}, "warning: null, now .*no meaning"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_extraction_is_refused_and_the_first_stays(model, images, tmp_path, change, said):
    extract(model, images, tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(InvalidInputError, match=said):
        extract(model, images, tmp_path, **change)
    with pytest.raises(InvalidInputError, match=said):
        extract(model, images, tmp_path, **change, dry_run=True)
    assert files_of(tmp_path) == before


def test_a_difference_is_said_once(model, images, tmp_path):
    extract(model, images, tmp_path)
    with pytest.raises(InvalidInputError) as refused:
        extract(model, images, tmp_path, layers=2)
    assert str(refused.value).count("layers: ") == 1


def test_other_weights_and_other_images_are_another_extraction(grafted, model, images, tmp_path):
    extract(model, images, tmp_path / "out")
    other = build(grafted)
    with torch.no_grad():
        other.norm.bias[0] += 1
    with pytest.raises(InvalidInputError, match="weights: "):
        extract(other, images, tmp_path / "out")
    photographs(tmp_path / "in", 11)
    with pytest.raises(InvalidInputError, match="images: 12, now 11; listing: "):
        extract(model, tmp_path / "in", tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(model, images, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInputError, match="other files there"):
        extract(model, images, tmp_path)
    assert set(files_of(tmp_path)) == {"thesis.txt", ".lock"}


def test_a_file_in_place_of_the_folder(model, images, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UnwritableOutputError, match="FileExistsError"):
        extract(model, images, tmp_path / "out")
    with pytest.raises(UnwritableOutputError, match="NotADirectoryError"):
        extract(model, images, tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 0}', "\0"])
def test_extraction_json_may_hold_anything(model, images, tmp_path, text):
    (tmp_path / "extraction.json").write_text(text)
    with pytest.raises(
        (InvalidInputError, UnreadableFileError), match=r"Expected (the|an) extraction"
    ):
        extract(model, images, tmp_path)


def test_random_weights_are_said_to_be_random(model, images, tmp_path):
    extract(model, images, tmp_path, random=True, name="ViT-Z")
    about = json.loads((tmp_path / "extraction.json").read_text())["model"]
    assert about["name"] == "ViT-Z"
    assert about["warning"] == "random weights: these maps carry no meaning"


# What cannot be asked


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ({"layers": 4}, OutOfRangeError, "between 0 and 3"),
        ({"layers": 0}, InvalidInputError, "at least one layer"),
        ({"layers": [3]}, OutOfRangeError, "blocks between -3 and 2"),
        ({"queries": "clss"}, InvalidInputError, "'clss'"),
        ({"queries": "registers"}, InvalidInputError, "a model without"),
        ({"queries": slice(0, 3, 0)}, InvalidInputError, "a step other than 0"),
        ({"queries": slice(0.5)}, InvalidInputError, "a slice of whole numbers"),
        ({"queries": b"cls"}, InvalidInputError, "whole numbers"),
        ({"queries": ["cls", "photo.jpg"]}, InvalidInputError, "'photo.jpg'"),
        ({"queries": [(1, 2, 3)]}, InvalidInputError, "a patch as"),
        ({"queries": [(-1, 2)]}, InvalidInputError, "'-1,2'"),
        ({"queries": ["register:1"]}, OutOfRangeError, "a model with registers"),
        ({"queries": []}, InvalidInputError, "at least one query"),
        ({"queries": [True]}, InvalidInputError, "whole numbers"),
        ({"heads": 3}, InvalidInputError, "heads"),
        ({"dtype": "int8"}, InvalidInputError, "'int8'"),
        ({"grid": (0, 3)}, InvalidInputError, "1 at least"),
        ({"grid": (3,)}, InvalidInputError, "grid as"),
        ({"grid": (3, 2.5)}, InvalidInputError, "whole numbers"),
        ({"batch_size": 0}, InvalidInputError, "batch_size of at least 1"),
        ({"shard_size": -1}, InvalidInputError, "shard_size of at least 1"),
        ({"max_pixels": 0}, InvalidInputError, "max_pixels of at least 1"),
        ({"max_pixels": 2.5}, InvalidInputError, "max_pixels as whole numbers"),
        ({"image_size": 0}, InvalidInputError, "image_size of at least 1"),
        ({"image_size": (8, -8)}, InvalidInputError, "image_size as"),
        ({"image_size": (8,)}, InvalidInputError, "image_size as"),
        ({"image_size": "8"}, InvalidInputError, "whole numbers"),
        ({"image_size": 8.5}, InvalidInputError, "whole numbers"),
        ({"grid": 3}, InvalidInputError, "grid as"),
        ({"workers": -1}, InvalidInputError, "workers of at least 0"),
        ({"workers": None}, InvalidInputError, "workers as whole numbers"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    model, images, tmp_path, asked, error, match
):
    with pytest.raises(error, match=match):
        extract(model, images, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_numbers_may_be_those_of_numpy(model, images, tmp_path):
    names = ("layers", "queries", "image_size", "max_pixels", "batch_size", "shard_size")
    asked = dict.fromkeys(names, 2) | {"image_size": 8, "max_pixels": 100}
    asked |= {"grid": (2, 2)}
    extract(model, images, tmp_path / "python", **asked)
    asked = {name: np.array(value)[()] for name, value in asked.items()}
    extract(model, images, tmp_path / "numpy", **asked)
    assert files_of(tmp_path / "python") == files_of(tmp_path / "numpy")


def test_a_size_of_less_than_one_patch_is_a_reason(model, images, tmp_path):
    done = extract(model, images, tmp_path, image_size=1, queries="patches")
    assert done.unreadable == done.images


def test_a_source_that_is_not_there_leaves_no_folder(model, tmp_path):
    with pytest.raises(UnreadableFileError, match="nowhere"):
        extract(model, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_training_is_refused(model, images, tmp_path):
    model.train()
    try:
        with pytest.raises(InvalidInputError, match=r"Call model\.eval\(\)"):
            extract(model, images, tmp_path)
    finally:
        model.eval()


def test_a_module_that_is_no_transformer_is_refused(images, tmp_path):
    with pytest.raises(InvalidInputError, match="one convolution inside"):
        extract(torch.nn.Linear(2, 2).eval(), images, tmp_path)


def test_nothing_is_drawn_from_the_global_generator(model, images, tmp_path):
    before = torch.get_rng_state()
    extract(model, images, tmp_path)
    assert_same_bits(torch.get_rng_state(), before)


# Buckets


@given(
    shapes=st.lists(st.integers(1, 9), max_size=80),
    batch_size=st.integers(1, 5),
)
def test_buckets_keep_every_picture_and_never_mix_sizes(shapes, batch_size):
    pictures = [Picture(None, np.zeros((shape, 1, 3), dtype=np.uint8)) for shape in shapes]
    buckets, batches, held = Buckets(batch_size), [], 0
    for picture in pictures:
        held += 1
        for batch in buckets.add(picture):
            batches.append(batch)
            held -= len(batch)
        assert held < WAITING * batch_size
    batches += buckets.rest()
    assert sorted(map(id, pictures)) == sorted(id(p) for batch in batches for p in batch)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({picture.pixels.shape for picture in batch}) == 1
    assert list(buckets.rest()) == []


# Workers and memory


def test_workers_make_the_same_bytes(model, tmp_path):
    """130 images, for a process is worth starting for every 64 of them."""
    folder = photographs(tmp_path / "in", 130)
    (folder / "broken.jpg").write_bytes(b"no image")
    for workers in (0, 2):
        extract(model, folder, tmp_path / str(workers), shard_size=50, workers=workers)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


class Dying:
    """Decodes until its process is gone, as one is that the system finds too large."""

    def __getitem__(self, numbered):
        os._exit(1)


def test_a_worker_that_dies_is_an_error(tmp_path):
    items = enumerate(list_items([draw(tmp_path / "a.png", (4, 4), 0)] * WORTH_A_WORKER))
    with pytest.raises(UnavailableError, match="try fewer workers"):
        list(decoded(Dying(), items, WORTH_A_WORKER, workers=1))


def test_images_that_fit_alone_run_alone(model, images, tmp_path, monkeypatch):
    """Attention that has memory for one image only, as a large batch leaves it."""
    asked = type(model).prepare_tokens_with_masks

    def small(self, x, *args, **kwargs):
        if len(x) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")
        return asked(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model), "prepare_tokens_with_masks", small)
    assert extract(model, images, tmp_path).unreadable == 0
    monkeypatch.undo()
    for entry, maps, _ in stored(tmp_path):
        weights, grid = alone(model, images / entry["path"], n=1, queries="cls")
        assert_close(maps, weights[..., 1:].unflatten(-1, grid), size=1.0)


def test_an_image_that_does_not_fit_alone_is_passed_over(model, images, tmp_path, monkeypatch):
    def none(self, x, *args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(type(model), "prepare_tokens_with_masks", none)
    done = extract(model, images, tmp_path)
    assert done.images == done.unreadable == done.failed == 12
    for line in index_of(tmp_path, "unreadable.jsonl"):
        assert "(MemoryError). Give a smaller image size" in line["reason"]
        assert line["reason"].endswith("pass over large ones: --max-pixels.")


def test_defaults_keep_full_matrices_within_memory(grafted):
    """Full matrices of all layers: few images run together, and a shard holds few."""
    from dinov2_attn.apps.extraction.options import (
        BATCH_BYTES,
        SHARD_BYTES,
        check_options,
        stored_bytes,
    )

    model = grafted.module(grafted.model).vit_small(patch_size=14, img_size=28, block_chunks=0)
    rest = {"heads": None, "dtype": "float32", "grid": None, "artifacts": False}
    rest |= {"image_size": None, "max_pixels": None, "batch_size": None, "shard_size": None}
    with dinov2_attn.install(grafted.package):
        small = check_options(model, layers=1, queries="cls", **rest)
        large = check_options(model, layers=None, queries=None, **rest)
    assert (small.batch_size, small.shard_size) == (16, 1024)
    one = stored_bytes(model, large, (37, 37))
    assert one == 12 * 6 * 1370**2 * 4
    assert large.batch_size == max(1, BATCH_BYTES // one)
    assert large.shard_size == max(1, SHARD_BYTES // one)


def test_a_process_without_standard_streams_has_no_bar(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    done = extract(model, images, tmp_path / "out", progress=True)
    assert done.unreadable == 0
