"""``dataset.sheet()`` and ``dinov2-attn summary``: which images in which order, and their maps."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.cli.main import main
from dinov2_attn.errors import InvalidInputError, OutOfRangeError, shown_name
from tests.support.extraction import build, draw, photographs

HOSTILE = '"><script>alert(1)<\u202egpj.\x1b[31m & "q\' {model} --> .png'


class Page(HTMLParser):
    """The figures of a sheet: the text, the images and the frames of each."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.figures, self.text = [], [], ""
        self.feed(content.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "figure":
            self.figures.append({"text": [], "images": [], "frames": 0})
        if tag == "img":
            self.figures[-1]["images"].append(dict(attrs))
        if tag == "rect":
            self.figures[-1]["frames"] += 1

    def handle_data(self, data):
        self.text += data
        if self.figures:
            self.figures[-1]["text"].append(data)

    def positions(self):
        return [int(re.search(r"dataset\[(\d+)\]", "".join(f["text"]))[1]) for f in self.figures]


def picture_of(attributes):
    kind, _, content = attributes["src"].partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:image/{image.format.lower()}"
    return np.asarray(image)


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = photographs(tmp_path_factory.mktemp("images") / "in", 9)
    draw(folder / HOSTILE, (8, 6), 99)
    return folder


@pytest.fixture(scope="module")
def out(model, images):
    extract(model, images, images.parent / "out", layers=[0, 2], artifacts=True, shard_size=4)
    return images.parent / "out"


def number_of(dataset, by, layer):
    place = [0, 2].index(layer)
    for entry in dataset.entries():
        tokens = 1 + math.prod(entry["grid"])
        yield {
            "prefix_mass": entry["prefix_mass"][place],
            "entropy": entry["entropy"][place] / math.log(tokens),
            "artifacts": len(entry["artifacts"]["tokens"]),
        }[by]


@given(
    by=st.sampled_from(["prefix_mass", "entropy", "artifacts"]),
    layer=st.sampled_from([0, 2]),
    lowest=st.booleans(),
    count=st.integers(1, 12),
)
def test_images_are_in_order(out, by, layer, lowest, count):
    dataset = AttentionDataset(out)
    sheet = dataset.sheet(by, layer=layer, lowest=lowest, count=count)
    numbers = list(number_of(dataset, by, layer))
    expected = sorted(range(10), key=lambda i: numbers[i] if lowest else -numbers[i])[:count]
    page = Page(sheet.content)
    assert page.positions() == expected
    assert (sheet.shown, sheet.images) == (min(count, 10), 10)
    assert f"{min(count, 10)} of 10 images" in page.text
    assert f"Layer {layer}," in page.text


def test_each_map_shows_its_own_numbers(out):
    """The brightest cell is where the maximum is, and the last colour is the number below."""
    dataset = AttentionDataset(out)
    page = Page(dataset.sheet(layer=0).content)
    for position, figure in zip(page.positions(), page.figures, strict=True):
        row, entry = dataset[position], dataset.entry(position)
        values = row["maps"][0].mean(0)[0].numpy() * (1 + math.prod(entry["grid"]))
        (image,) = figure["images"]
        pixels = picture_of(image)
        assert pixels.shape == (*entry["grid"], 3)
        highest = float(re.search(r"colours to ([\d.e+-]+)×", "".join(figure["text"]))[1])
        expected = matplotlib.colormaps["viridis"](values / highest, bytes=True)[..., :3]
        assert np.abs(pixels.astype(int) - expected).max() <= 4  # the number has three digits
        at = divmod(int(values.argmax()), values.shape[1])
        assert f"highest in row {at[0]}, column {at[1]}, {values.max():.3g} times" in image["alt"]
        assert (int(image["height"]), int(image["width"])) == tuple(entry["grid"])


def test_artifact_tokens_are_framed_and_set_no_limits(out, tmp_path):
    """The highest patch is one of the two that are planted, so the others set the colours."""
    dataset = AttentionDataset(out)
    maps = [(1 + row["maps"][1, 0, 0].numel()) * row["maps"][1].mean(0)[0] for row in dataset]
    highest = [divmod(int(values.argmax()), values.shape[1]) for values in maps]
    changed = copied(out, tmp_path, lambda i, entry: plant(entry, highest[i]))
    page = Page(changed.sheet("artifacts").content)
    for i, figure in zip(page.positions(), page.figures, strict=True):
        assert figure["frames"] == 4
        for token in changed.entry(i)["artifacts"]["tokens"]:
            maps[i][token["row"], token["col"]] = 0
        assert f"2 artifacts · colours to {maps[i].max():.3g}×" in "".join(figure["text"])


def plant(entry, place):
    """Name two patches of an image artifact tokens, one of them at ``place``."""
    places = [place, (0, 0) if place != (0, 0) else (0, 1)]
    entry["artifacts"]["tokens"] = [{"row": row, "col": col} for row, col in places]


def copied(out, folder, change):
    """Return an extraction of the same shards, with ``change`` made to the lines of its index."""
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        change(i, line)
    (folder / "changed").mkdir()
    (folder / "changed" / "shards").symlink_to(out / "shards")
    (folder / "changed" / "extraction.json").write_bytes((out / "extraction.json").read_bytes())
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "changed" / "index.jsonl").write_text(text)
    return AttentionDataset(folder / "changed")


def test_resampled_maps_have_the_same_unit(model, images, tmp_path):
    """Attention that is uniform on patches is so after resampling: their mean stays."""
    extract(model, images, tmp_path / "own")
    extract(model, images, tmp_path / "grid", grid=(4, 4))
    own, grid = AttentionDataset(tmp_path / "own"), AttentionDataset(tmp_path / "grid")
    from dinov2_attn.apps.extraction.thumbnails import map_picture

    for i in range(len(own)):
        means = [
            map_picture(dataset[i], 0, dataset.entry(i)).values.mean() for dataset in (own, grid)
        ]
        assert means[1] == pytest.approx(means[0], rel=1e-5)


def test_photographs_are_those_of_the_extraction(out, images, tmp_path):
    dataset = AttentionDataset(out)
    page = Page(dataset.sheet(images=images).content)
    for position, figure in zip(page.positions(), page.figures, strict=True):
        photograph, _ = figure["images"]
        entry = dataset.entry(position)
        # cropped to whole patches of 2 × 2, as the map is
        assert picture_of(photograph).shape == (*(2 * side for side in entry["grid"]), 3)

    copied = tmp_path / "in"
    for path in images.rglob("*.png"):
        (copied / path.relative_to(images)).parent.mkdir(parents=True, exist_ok=True)
        (copied / path.relative_to(images)).write_bytes(path.read_bytes())
    entries = list(dataset.entries())
    (copied / entries[0]["path"]).unlink()
    (copied / entries[1]["path"]).write_bytes((copied / entries[2]["path"]).read_bytes())
    page = Page(dataset.sheet(images=copied).content)
    shown_at = {
        position: len(figure["images"])
        for position, figure in zip(page.positions(), page.figures, strict=True)
    }
    assert shown_at == {i: 1 if i in (0, 1) else 2 for i in range(10)}
    assert "Photographs not found: 1." in page.text
    assert "Photographs changed since: 1." in page.text


def test_names_are_data(model, images, tmp_path):
    name = "</title><img src=x onerror=alert(1)> {policy}" + "x" * 10**6
    extract(model, images, tmp_path / "<b>&.out", name=name, warning="<i>{figures}</i>\x00")
    content = AttentionDataset(tmp_path / "<b>&.out").sheet(images=images).content
    page = Page(content)
    assert not {"script", "b", "i"} & set(page.tags)
    assert page.tags.count("img") == 2 * len(page.figures)
    escaped = r""""><script>alert(1)<\u202egpj.\x1b[31m & "q' {model} --> .png"""
    assert any(escaped in "".join(figure["text"]) for figure in page.figures)
    assert "<i>{figures}</i>\\x00" in page.text
    assert "<b>&.out" in page.text
    assert len(content) < 10**5
    assert b"default-src 'none'" in content
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xe2\x80\xae", content)


@given(st.text())
def test_what_is_shown_is_printable_and_short(name):
    found = shown_name(name)
    assert found.isprintable()
    assert len(found) <= 2001
    if name.isprintable() and len(name) <= 200:
        assert found == name


def test_numbers_that_are_missing_come_last(out, tmp_path):
    def forget(i, entry):
        if i == 3:
            entry["prefix_mass"] = [None, None]

    changed = copied(out, tmp_path, forget)
    for lowest in (False, True):
        page = Page(changed.sheet(lowest=lowest).content)
        assert page.positions()[-1] == 3
        assert "prefix unknown" in "".join(page.figures[-1]["text"])


def test_a_dataset_without_images_has_a_sheet(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    extract(model, tmp_path / "broken.png", tmp_path / "out")
    sheet = AttentionDataset(tmp_path / "out").sheet()
    assert Page(sheet.content).figures == []


def test_what_cannot_be_sorted_is_refused(model, out, images, tmp_path):
    dataset = AttentionDataset(out)
    with pytest.raises(InvalidInputError, match="by as one of"):
        dataset.sheet("mass")
    with pytest.raises(OutOfRangeError, match="a layer that is stored: 0, 2"):
        dataset.sheet(layer=1)
    with pytest.raises(InvalidInputError, match="count of at least 1"):
        dataset.sheet(count=0)
    extract(model, images, tmp_path / "without")
    with pytest.raises(InvalidInputError, match="with artifact tokens"):
        AttentionDataset(tmp_path / "without").sheet("artifacts")


def test_a_notebook_shows_it_without_scripts(out):
    html = AttentionDataset(out).sheet()._repr_html_()
    assert html.startswith("<iframe srcdoc=")
    assert 'sandbox=""' in html
    assert "<figure" not in html


def test_the_command_writes_the_same_page(out, images, tmp_path, caplog, capsys):
    page = tmp_path / "new" / "sheet.html"
    options = ["--sort", "entropy", "--lowest", "--layer", "0", "--count", "4"]
    options += ["--images", str(images)]
    assert main(["summary", str(out), "-o", str(page), *options]) == 0
    dataset = AttentionDataset(out)
    sheet = dataset.sheet("entropy", lowest=True, layer=0, count=4, images=images)
    assert page.read_bytes() == sheet.content
    assert f"wrote {page}: 4 of 10 images" in capsys.readouterr().out
    assert main(["summary", str(tmp_path), "-o", str(page)]) == 2
    assert "Name the folder that" in caplog.text
    assert main(["summary", str(out), "-o", str(page), "--sort", "artifacts"]) == 0
    (tmp_path / "folder.html").mkdir()
    assert main(["summary", str(out), "-o", str(tmp_path / "folder.html")]) == 2
    for wrong in (["absent"], [str(out), "--images", "absent"]):
        assert main(["summary", *wrong, "-o", str(page)]) == 2
