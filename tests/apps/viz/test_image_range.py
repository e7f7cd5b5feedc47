"""Numbers of any depth come out as what they mean, or with a word that says how."""

from __future__ import annotations

import importlib.util
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dinov2_attn
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support.raw_files import png, tiff
from tests.support.tolerances import assert_close

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights

NEEDS_TIFFFILE = pytest.mark.skipif(
    importlib.util.find_spec("tifffile") is None, reason="tifffile is not installed"
)
PATTERN = np.random.default_rng(0).random((28, 42))
PATTERN[0, :2] = 0, 1  # both ends
EIGHT = np.rint(PATTERN * 255)


def deep(bits, dtype=np.uint16):
    return np.rint(PATTERN * (2**bits - 1)).astype(dtype)


def grey(path, **options):
    """The picture of a grey file, and that nothing was warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_image(path, 14, **options).picture.astype(int)
    assert np.ptp(picture, axis=2).max() == 0
    return picture[..., 0]


def write(path, values):
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".png":
        png(path, values)
    else:
        tiff(path, values)
    return path


@pytest.mark.parametrize("suffix", ["tif", "png", "npy"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_few_bits_of_sixteen_are_warned_of_and_the_advice_is_right(tmp_path, suffix, bits):
    path = write(tmp_path / f"deep.{suffix}", deep(bits))
    with pytest.warns(dinov2_attn.errors.SuspiciousRangeWarning) as warned:
        dark = load_image(path, 14).picture
    assert dark.max() <= 64
    message = str(warned[0].message)
    assert str(path) in message
    assert f"--range 0,{2**bits - 1} " in message
    advised = re.search(r"range=\((\d+), (\d+)\)", message)
    assert np.abs(grey(path, range=(int(advised[1]), int(advised[2]))) - EIGHT).max() <= 1
    assert np.abs(grey(path, range=(0, 65535)) - dark[..., 0]).max() == 0  # as dark as it is


@pytest.mark.parametrize("bits", [15, 16])
def test_sixteen_bits_that_are_used_are_nothing_to_say(tmp_path, bits):
    path = write(tmp_path / "deep.png", deep(bits))
    assert_close(grey(path), np.rint(deep(bits) / 257), within=0)


def test_nothing_but_zeros_is_nothing_to_say(tmp_path):
    assert (grey(write(tmp_path / "black.png", deep(12) * 0)) == 0).all()


@pytest.mark.parametrize("stated", [{"t281": 4095}, {"t281": 3000}, {"t341": 4095}])
def test_a_tiff_may_state_its_greatest_value(tmp_path, stated):
    """The greatest value is that of the image as often as that of the sensor."""
    values = np.minimum(deep(12), min(stated.values()))
    path = tiff(tmp_path / "stated.tif", values, **stated)
    assert np.abs(grey(path) - np.minimum(EIGHT, values.max() / 4095 * 255)).max() <= 1


def test_a_statement_that_is_not_true_is_not_believed(tmp_path):
    path = tiff(tmp_path / "stated.tif", deep(16), t281=4095)
    assert_close(grey(path), np.rint(deep(16) / 257), within=0)


def test_twelve_bits_that_are_packed_as_such(tmp_path):
    assert np.abs(grey(tiff(tmp_path / "packed.tif", deep(12), bits=12)) - EIGHT).max() <= 1


def test_white_may_be_zero(tmp_path):
    path = tiff(tmp_path / "negative.tif", deep(16), t262=0)
    assert np.abs(255 - grey(path) - EIGHT).max() <= 1


SIGNED = {
    "int8": ((PATTERN * 255 - 128).round().astype(np.int8), (-128, 127)),
    "int16": ((PATTERN * 4095 - 1000).round().astype(np.int16), (-1000, 3095)),
    "int32": ((PATTERN * 4095).round().astype(np.int32), (0, 4095)),
    "uint32": ((PATTERN * (2**32 - 1)).round().astype(np.uint32), (0, 2**32 - 1)),
    "unit floats": (PATTERN.astype(np.float32), (0, 1)),
    "signed floats": ((PATTERN * 2 - 1).astype(np.float32), (-1, 1)),
    "large floats": ((PATTERN * 3e9).astype(np.float32), (0, 3e9)),
}


@pytest.mark.parametrize("suffix", ["tif", "npy"])
@pytest.mark.parametrize(("values", "ends"), SIGNED.values(), ids=SIGNED)
def test_numbers_without_a_known_range_are_read_with_one(tmp_path, values, ends, suffix):
    path = write(tmp_path / f"deep.{suffix}", values)
    with pytest.raises(UnreadableFileError, match=r"(?s)no known range.*--range") as error:
        load_image(path, 14)
    assert f"run from {values.min():g} to {values.max():g}" in str(error.value)
    assert np.abs(grey(path, range=ends) - EIGHT).max() <= 1
    assert np.abs(grey(path, range="auto") - EIGHT).max() <= 1


@pytest.mark.parametrize("name", ["unit floats", "signed floats", "int32"])
def test_the_range_that_is_advised_is_right_where_it_is_usual(tmp_path, name):
    path = write(tmp_path / "deep.tif", SIGNED[name][0])
    with pytest.raises(UnreadableFileError) as error:
        load_image(path, 14)
    low, high = re.search(r"--range[ =](\S+?),(\S+?),? or", str(error.value)).groups()
    assert np.abs(grey(path, range=(float(low), float(high))) - EIGHT).max() <= 1


def test_floats_whose_file_states_their_range(tmp_path):
    path = tiff(tmp_path / "stated.tif", (PATTERN * 3).astype(np.float32), t340=0.0, t341=3.0)
    assert np.abs(grey(path) - EIGHT).max() <= 1


@given(low=st.integers(-300, 300), width=st.integers(1, 600), data=st.data())
def test_what_is_outside_of_a_range_is_black_or_white(tmp_path_factory, low, width, data):
    values = data.draw(st.lists(st.integers(-400, 1000), min_size=4, max_size=4))
    path = tmp_path_factory.getbasetemp() / "values.npy"
    np.save(path, np.array(values, np.int16).reshape(2, 2))
    expected = [(min(max(v, low), low + width) - low) / width * 255 for v in values]
    photograph = load_image(path, 1, range=(low, low + width))
    found = photograph.picture[..., 0].ravel()
    assert_close(found, expected, within=0.5001)
    assert photograph.ends == (low, low + width)


@pytest.mark.parametrize("range", [None, (0, 1), "auto"])
def test_nan_is_refused(tmp_path, range):
    values = PATTERN.astype(np.float32)
    values[3, 4] = np.nan
    with pytest.raises(UnreadableFileError, match=r"of which 1 value is NaN\.\nReplace"):
        load_image(tiff(tmp_path / "nan.tif", values), 14, range=range)


@pytest.mark.parametrize("range", [(0, 1), "auto"])
def test_infinity_is_black_or_white(tmp_path, range):
    values = PATTERN.astype(np.float32)
    values[3, 4:6] = -np.inf, np.inf
    found = grey(tiff(tmp_path / "infinite.tif", values), range=range)
    assert tuple(found[3, 4:6]) == (0, 255)
    found[3, 4:6] = EIGHT[3, 4:6]
    assert np.abs(found - EIGHT).max() <= 1


def test_auto_of_a_constant_image_says_so(tmp_path):
    path = write(tmp_path / "flat.png", np.full((28, 42), 700, np.uint16))
    with pytest.warns(dinov2_attn.errors.SuspiciousRangeWarning, match=r"every value is 700"):
        assert (load_image(path, 14, range="auto").picture == 0).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_range_of_eight_bits_is_heard_too(tmp_path, mode):
    Image.fromarray(EIGHT.astype(np.uint8)).convert(mode).save(tmp_path / "image.png")
    expected = ((EIGHT - 50) / 100 * 255).clip(0, 255)
    assert np.abs(grey(tmp_path / "image.png", range=(50, 150)) - expected).max() <= 1


@pytest.mark.parametrize("range", [(1, 1), (2, 1), (0, float("nan")), "most", (0, 1, 2), 5, "0,1"])
def test_a_range_that_is_none(tmp_path, range):
    path = write(tmp_path / "deep.png", deep(12))
    with pytest.raises(InvalidInputError, match=r"range as \(low, high\)"):
        load_image(path, 14, range=range)


# Colours of 16 bits, of which Pillow keeps the upper 8


COLOURS = np.stack([PATTERN, PATTERN[::-1], PATTERN[:, ::-1]], axis=-1)


@pytest.mark.parametrize("suffix", ["png", pytest.param("tif", marks=NEEDS_TIFFFILE)])
@pytest.mark.parametrize("bits", [8, 12, 14])
def test_colours_of_few_bits_are_warned_of_and_read_in_full(tmp_path, suffix, bits):
    path = write(tmp_path / f"colour.{suffix}", np.rint(COLOURS * (2**bits - 1)).astype(np.uint16))
    with pytest.warns(dinov2_attn.errors.SuspiciousRangeWarning, match=f"--range 0,{2**bits - 1} "):
        load_image(path, 14)
    picture = load_image(path, 14, range=(0, 2**bits - 1)).picture
    assert np.abs(picture - COLOURS * 255).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_all_bits_are_nothing_to_say(tmp_path, suffix):
    path = write(tmp_path / f"colour.{suffix}", np.rint(COLOURS * 65535).astype(np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(load_image(path, 14).picture - COLOURS * 255).max() <= 1


def test_colours_that_pillow_cannot_read_name_what_can(tmp_path):
    if importlib.util.find_spec("tifffile"):
        pytest.skip("tifffile reads it")
    path = write(tmp_path / "colour.tif", (COLOURS * 4095).astype(np.uint16))
    with pytest.raises(UnreadableFileError, match="pip install tifffile"):
        load_image(path, 14)


# As it is typed


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("command", ["heatmap", "explore", "extract"])
def test_every_command_warns_in_a_line_and_hears_the_range(tmp_path, weights, command, caplog):
    path = write(tmp_path / "deep.png", deep(12))
    out = tmp_path / ("page.html" if command == "explore" else "out")
    asked = [command, path, "-o", out, "--weights", weights]
    assert main([*map(str, asked)]) == 0
    (warning,) = _warned(caplog)
    assert re.search(r"deep\.png: the largest value is 4,095 of 65,535.*--range 0,4095 ", warning)
    out.rename(tmp_path / "before")
    caplog.clear()
    assert main([*map(str, asked), "--range", "0,4095"]) == 0
    assert not _warned(caplog)


def _warned(caplog):
    ours = (record for record in caplog.records if record.name.startswith("dinov2_attn"))
    return [record.getMessage() for record in ours if record.levelname == "WARNING"]


@pytest.mark.parametrize("value", ["4095", "1,0", "0,x", "", "0,nan", "0,1,2"])
def test_a_range_that_is_typed_wrong(value, capsys):
    with pytest.raises(SystemExit):
        main(["heatmap", "a.png", "-o", "out", f"--range={value}"])
    assert "expected LOW,HIGH with LOW below HIGH, or auto" in capsys.readouterr().err
