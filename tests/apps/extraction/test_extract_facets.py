"""``extract(facets=…)``: what the kernel was given for the patches, beside the maps."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import AttentionDataset, extract, record
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from dinov2_attn.maps.resample import resample
from tests.support.extraction import build, index_of, photographs
from tests.support.tolerances import assert_close


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("images") / "in")


def alone(model, path, *names):
    with torch.no_grad(), record(model, [1, 2], facets=names) as maps:
        model(load_image(path, 2).tensor[None])
    return [torch.stack(maps.facet_maps(name), 1)[0] for name in names]


@pytest.mark.parametrize("grid", [None, (2, 2), (3, 1)])
@pytest.mark.parametrize("names", [("key",), ("value", "query")])
def test_each_image_has_the_facets_it_has_alone(model, images, tmp_path, names, grid):
    extract(model, images, tmp_path, layers=[1, 2], facets=names, grid=grid, shard_size=5)
    stored = AttentionDataset(tmp_path)
    assert len(stored) == 12
    for number, row in enumerate(stored):
        entry = stored.entry(number)
        assert entry["facets"] == list(names)
        for name, expected in zip(names, alone(model, images / row["path"], *names), strict=True):
            assert_close(row[name], expected if grid is None else on_grid(expected, grid))


def on_grid(facet, grid):
    """The mean over the area of each new cell."""
    return resample(facet, grid) / resample(torch.ones_like(facet), grid)


def test_maps_are_those_without_facets_and_so_are_artifacts(model, images, tmp_path):
    for folder, facets in (("with", "key"), ("without", ())):
        extract(model, images, tmp_path / folder, layers=None, facets=facets, artifacts=True)
    ours, plain = (AttentionDataset(tmp_path / folder) for folder in ("with", "without"))
    for one, other in zip(ours, plain, strict=True):
        assert_close(one["maps"], other["maps"], size=1.0)
        assert_close(one["prefix"], other["prefix"], size=1.0)
        assert "key" not in other
    assert "facets" not in plain.entry(0)
    for one, other in zip(index_of(tmp_path / "with"), index_of(tmp_path / "without"), strict=True):
        assert one["artifacts"] == other["artifacts"]


@pytest.mark.parametrize("kind", ["maps", "prefix", "query", "key"])
def test_each_damaged_tensor_is_written_again_with_verify(model, images, tmp_path, kind):
    """The header of the file is as it was: only the bytes of one tensor differ."""
    safetensors = pytest.importorskip("safetensors")
    options = {"facets": ["query", "key"], "shard_size": 6}
    extract(model, images, tmp_path, **options)
    shard = min((tmp_path / "shards").glob("*.safetensors"))
    before = shard.read_bytes()
    with safetensors.safe_open(shard, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[f"1.{kind}"].view(-1)[-1] += 1
    safetensors.torch.save_file(tensors, shard, metadata)
    assert shard.stat().st_size == len(before)
    with pytest.raises(UnreadableFileError, match="other bytes for image 1"):
        AttentionDataset(tmp_path)[1]
    assert extract(model, images, tmp_path, verify=True, **options).written == 1
    assert len(list(AttentionDataset(tmp_path))) == 12


def test_a_damaged_facet_is_found(model, images, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    extract(model, images, tmp_path, facets=["key"])
    (shard,) = (tmp_path / "shards").glob("*.safetensors")
    tensors = safetensors.load_file(shard)
    tensors["0.key"] += 1
    safetensors.save_file(tensors, shard)
    with pytest.raises(UnreadableFileError, match="other bytes"):
        AttentionDataset(tmp_path)[0]


def test_a_second_run_has_to_ask_for_the_same(model, images, tmp_path):
    extract(model, images, tmp_path, facets=["key"])
    with pytest.raises(InvalidInputError, match=r"facets: \[.key.\], now \[\]"):
        extract(model, images, tmp_path)
    assert extract(model, images, tmp_path, facets=["key"]).written == 0


def test_a_preview_counts_their_bytes(model, images, tmp_path):
    plain = extract(model, images, tmp_path, dry_run=True, layers=2).bytes
    more = extract(model, images, tmp_path, dry_run=True, layers=2, facets=["key", "value"]).bytes
    extract(model, images, tmp_path / "out", layers=2, facets=["key", "value"])
    rows = list(AttentionDataset(tmp_path / "out"))
    assert more - plain == sum(4 * row[name].numel() for row in rows for name in ("key", "value"))


def test_stored_dtypes_are_those_of_the_maps(model, images, tmp_path):
    extract(model, images, tmp_path, facets="value", dtype="float16")
    row = AttentionDataset(tmp_path)[0]
    assert row["value"].dtype == row["maps"].dtype == torch.float16


def test_the_folder_says_what_they_are_and_a_batch_has_them(model, images, tmp_path):
    extract(model, images, tmp_path, layers=2, facets=["key"])
    stored = AttentionDataset(tmp_path)
    axes = ["layers", "channels", "rows", "columns"]
    assert stored.about["tensors"]["key"] == axes
    assert "axes of `N.key`" in (tmp_path / "README.md").read_text()
    rows = list(stored)
    batch = stored.collate(rows)
    for number, row in enumerate(rows):
        height, width = row["key"].shape[-2:]
        assert_close(batch["key"][number, ..., :height, :width], row["key"])
    assert_close(batch["key"].double().sum(), sum(row["key"].double().sum() for row in rows))


def test_other_names_are_said_before_the_first_image(model, images, tmp_path):
    with pytest.raises(InvalidInputError, match="'query', 'key', 'value'"):
        extract(model, images, tmp_path / "out", facets=["keys"])
    assert not (tmp_path / "out").exists()


def test_models_of_other_libraries_have_them_too(images, tmp_path):
    timm = pytest.importorskip("timm", reason="DINOv2's own models run")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    extract(model, images, tmp_path, image_size=(32, 32), facets="key")
    assert AttentionDataset(tmp_path)[0]["key"].shape == (1, 192, 2, 2)
