"""Mean and deviation are what was asked for, everywhere, and what is written says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dinov2_attn
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.demo.load import PATH as DEMO
from dinov2_attn.apps.explorer.explore import explore
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError
from tests.support.extraction import build, draw, files_of, stored
from tests.support.tolerances import assert_close

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights

PATHOLOGY = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
units = st.floats(0, 1, width=32)
deviations = st.floats(0.0009765625, 1, width=32)


@pytest.fixture
def grafted(first):
    """Upstream itself, grafted for one test: programs install and leave nothing."""
    with dinov2_attn.install(first.package):
        yield first


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("normalised") / "image.png", (28, 42), 0)


def by_hand(path, mean, std):
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(v).double().reshape(-1, 1, 1) for v in (mean, std))
    return (pixels - mean) / std


@given(
    mean=st.one_of(units, st.lists(units, min_size=3, max_size=3)),
    std=st.one_of(deviations, st.lists(deviations, min_size=3, max_size=3)),
)
def test_it_is_subtracted_and_divided(path, mean, std):
    found = load_image(path, 14, mean=mean, std=std).tensor
    assert_close(found, by_hand(path, mean, std), within=1e-3)


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor])
def test_numbers_of_every_kind_are_taken(path, kind):
    one = load_image(path, 14, **PATHOLOGY)
    other = load_image(path, 14, **{name: kind(v) for name, v in PATHOLOGY.items()})
    assert_close(other.tensor, one.tensor)
    assert_close(one.picture, load_image(path, 14).picture, within=0)


WRONG = {
    "two": ({"mean": (0.5, 0.5)}, r"(?s)mean as one number, or 3.*\.\nFound 2 numbers"),
    "of 0…255": ({"mean": (123.675, 116.28, 103.53)}, r"Found 123\.675\.\nDivide by 255: 0\.485"),
    "deviation of 0…255": ({"std": 58.395}, r"Found 58\.395\.\nDivide by 255: 0\.229"),
    "negative": ({"mean": -0.1}, r"(?s)mean between 0 and 1.*Found -0\.1"),
    "no deviation": ({"std": (0.2, 0, 0.2)}, r"std above 0"),
    "no number": ({"mean": float("nan")}, r"Found nan"),
    "words": ({"std": "imagenet"}, r"Found 'imagenet'"),
    "none": ({"mean": ()}, r"Found 0 numbers"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be(path, tmp_path, options, message, grafted):
    with pytest.raises(InvalidInputError, match=message):
        load_image(path, 14, **options)
    with pytest.raises(InvalidInputError, match=message):
        dinov2_attn.extract(build(grafted).eval(), path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def run(command, path, out, *options):
    options = [*map(str, options), "--weights", str(DEMO)]
    return main([command, str(path), "-o", str(out), *options])


TYPED = ["--mean", "0.707223,0.578729,0.703617", "--std", "0.211883,0.230117,0.177517"]


@pytest.mark.usefixtures("imported")
def test_heatmap_hears_it_and_says_it(path, tmp_path):
    assert run("heatmap", path, tmp_path / "plain", "--outliers", "none") == 0
    assert run("heatmap", path, tmp_path / "own", "--outliers", "none", *TYPED) == 0
    plain, own = (np.load(tmp_path / name / "attention.npy") for name in ("plain", "own"))
    assert np.abs(plain - own).max() > 1e-4
    stated = json.loads((tmp_path / "own" / "image.json").read_text())
    assert stated == {
        "channels": 3,
        "size": [28, 42],
        "range": [0, 255],
        "mean": list(PATHOLOGY["mean"]),
        "std": list(PATHOLOGY["std"]),
    }
    stated = json.loads((tmp_path / "plain" / "image.json").read_text())
    assert stated["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.usefixtures("imported")
def test_the_page_hears_it_and_says_it(path, tmp_path):
    assert run("explore", path, tmp_path / "own.html", *TYPED) == 0
    assert "mean 0.707223, 0.578729, 0.703617 and standard deviation 0.211883" in (
        (tmp_path / "own.html").read_text()
    )
    assert run("explore", path, tmp_path / "plain.html") == 0
    assert "mean 0.485, 0.456, 0.406 and" in (tmp_path / "plain.html").read_text()


def test_a_page_of_an_unknown_image_says_nothing(path, tmp_path, grafted):
    model = build(grafted).eval()
    read = load_image(path, 2)
    explore(model, type(read)(read.tensor, read.picture), tmp_path / "page.html")
    assert "normalised with" not in (tmp_path / "page.html").read_text()


def test_an_extraction_is_that_of_images_normalised_by_hand(path, tmp_path, grafted):
    model = build(grafted).eval()
    dinov2_attn.extract(model, path, tmp_path / "out", **PATHOLOGY)
    ((_, maps, _),) = stored(tmp_path / "out")
    images = by_hand(path, *PATHOLOGY.values()).float()[None]
    expected = dinov2_attn.attention_maps(model, images, 1, queries="cls").patch_maps()[0]
    assert_close(maps, expected, within=1e-5)


OTHERS = {
    "mean": ({"mean": 0.5}, r"mean: \[0\.5, 0\.5, 0\.5\], now \[0\.485, 0\.456, 0\.406\]"),
    "std": ({"std": (0.5, 0.5, 0.5)}, r"std: \[0\.5, 0\.5, 0\.5\], now \[0\.229"),
    "range": ({"range": (0, 200)}, r"range: \[0\.0, 200\.0\], now null"),
    "auto": ({"range": "auto"}, r'range: "auto", now null'),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_a_folder_of_another_normalisation_is_refused(tmp_path, options, message, path, grafted):
    model = build(grafted).eval()
    dinov2_attn.extract(model, path, tmp_path / "out", **options)
    before = files_of(tmp_path / "out")
    with pytest.raises(InvalidInputError, match=message):
        dinov2_attn.extract(model, path, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert dinov2_attn.extract(model, path, tmp_path / "out", **options).written == 0


@pytest.mark.parametrize("option", ["--mean", "--std"])
@pytest.mark.parametrize("value", ["", "a", "0.5,", "0.5,nan", "0.5 0.5"])
def test_what_is_typed_wrong(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["heatmap", "a.png", "-o", "out", f"{option}={value}"])
    assert "expected numbers with commas between them" in capsys.readouterr().err


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("command", ["heatmap", "explore", "extract"])
def test_a_mean_of_other_channels_stops_before_anything_is_read(tmp_path, command, caplog):
    image, out = tmp_path / "broken.png", tmp_path / "page.html"
    image.write_bytes(b"no image")  # which nothing may read
    assert run(command, image, out, "--mean", "0.5,0.5") == 2
    assert "mean as one number, or 3, the model taking 3 channels.\nFound 2" in caplog.text
    assert not out.exists()
