"""Images in DICOM files, with the range that the file states."""

from __future__ import annotations

import logging
import tarfile

import numpy as np
import pytest

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError, SuspiciousRangeWarning, UnreadableFileError
from tests.support.extraction import build, draw
from tests.support.subprocesses import python
from tests.support.tolerances import assert_close, assert_same_bits

pydicom = pytest.importorskip("pydicom", minversion="3", reason="pip install 'dinov2-attn[dicom]'")
pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights

# Hounsfield units of 4 × 6 pixels: air, water, bone.
UNITS = np.linspace(-1024, 2000, 24).round().reshape(4, 6)


def written(path, values, **elements):
    """Write ``values`` with the ``elements`` of DICOM, and return the path."""
    values = np.asarray(values)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    frames = values.shape[:-2] if elements.get("SamplesPerPixel", 1) == 1 else ()
    if frames:
        dataset.NumberOfFrames = frames[0]
    dataset.Rows, dataset.Columns = values.shape[len(frames) : len(frames) + 2]
    given = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8 * values.dtype.itemsize,
        "BitsStored": 8 * values.dtype.itemsize,
        "PixelRepresentation": int(values.dtype.kind == "i"),
        **elements,
    }
    given.setdefault("HighBit", given["BitsStored"] - 1)
    for name, value in given.items():
        setattr(dataset, name, value)
    dataset.PixelData = values.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def ct(path, **elements):
    """A slice whose stored numbers are 1024 more than its units, of 12 bits."""
    stored = (UNITS + 1024).astype(np.uint16)
    return written(path, stored, BitsStored=12, RescaleSlope=1, RescaleIntercept=-1024, **elements)


def grey(path, **options):
    picture = load_image(path, 2, **options).picture
    assert np.ptp(picture, axis=2).max() == 0
    return picture[..., 0].astype(int)


def scaled(low, high, values=UNITS):
    return np.rint(((values - low) / (high - low)).clip(0, 1) * 255)


def test_a_window_says_what_is_black_and_white(tmp_path):
    path = ct(tmp_path / "a.dcm", WindowCenter=40, WindowWidth=400)
    low, high = 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2  # PS3.3, C.11.2.1.2.1
    assert_same_bits(grey(path), scaled(low, high).astype(int))
    assert load_image(path, 2).ends == (low, high)
    exact = ct(tmp_path / "b.dcm", WindowCenter=40, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    assert load_image(exact, 2).ends == (-160, 240)


def test_the_first_of_several_windows_counts(tmp_path):
    path = ct(tmp_path / "a.dcm", WindowCenter=[300, 40], WindowWidth=[2000, 80])
    assert load_image(path, 2).ends == (300 - 0.5 - 1999 / 2, 300 - 0.5 + 1999 / 2)


def test_without_a_window_the_stored_bits_are_the_range(tmp_path):
    assert load_image(ct(tmp_path / "a.dcm"), 2).ends == (-1024, 4095 - 1024)
    signed = written(tmp_path / "b.dcm", UNITS.astype(np.int16), BitsStored=12)
    assert load_image(signed, 2).ends == (-2048, 2047)
    assert_same_bits(grey(signed), scaled(-2048, 2047).astype(int))
    stored = (UNITS + 1024).astype(np.uint16)
    with pytest.warns(SuspiciousRangeWarning, match="--range 0,4095"):
        load_image(written(tmp_path / "c.dcm", stored), 2)


def test_sixteen_signed_or_rescaled_bits_need_a_range_as_in_any_file(tmp_path):
    stored = (UNITS + 1024).astype(np.uint16)
    for path in (
        written(tmp_path / "a.dcm", UNITS.astype(np.int16)),
        written(tmp_path / "b.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024),
    ):
        with pytest.raises(UnreadableFileError, match="Say what is black and what is white"):
            load_image(path, 2)
        assert_same_bits(grey(path, range=(-1000, 400)), scaled(-1000, 400).astype(int))


def test_a_range_is_in_units_of_the_file(tmp_path):
    path = ct(tmp_path / "a.dcm", WindowCenter=40, WindowWidth=400)
    assert_same_bits(grey(path, range=(-1000, 400)), scaled(-1000, 400).astype(int))
    assert load_image(path, 2, range="auto").ends == (-1024, 2000)


def test_low_values_of_monochrome1_are_white(tmp_path):
    options = {"WindowCenter": 500, "WindowWidth": 2000}
    usual = grey(ct(tmp_path / "a.dcm", **options))
    path = ct(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1", **options)
    assert_same_bits(grey(path), 255 - usual)


def test_a_table_of_the_file_is_applied(tmp_path):
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 8])
    table.add_new("LUTData", "US", list(range(255, -1, -1)))
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    path = written(tmp_path / "a.dcm", stored, VOILUTSequence=[table])
    assert_same_bits(grey(path), 255 - stored.astype(int))
    assert_same_bits(grey(path, range=(0, 255)), stored.astype(int))


def test_of_several_frames_the_first_is_taken_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dinov2_attn")
    frames = np.stack([np.full((4, 6), value, np.uint8) for value in (50, 200)])
    assert (grey(written(tmp_path / "a.dcm", frames)) == 50).all()
    assert "a.dcm has 2 frames: the first is taken" in caplog.text


def test_frames_may_have_their_own_window(tmp_path):
    window, groups = pydicom.Dataset(), pydicom.Dataset()
    window.WindowCenter, window.WindowWidth = 100, 101
    groups.FrameVOILUTSequence = [window]
    frames = np.full((2, 4, 6), 100, np.uint16)
    path = written(tmp_path / "a.dcm", frames, PerFrameFunctionalGroupsSequence=[groups, groups])
    assert load_image(path, 2).ends == (49.5, 149.5)


def test_colours_are_colours(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    options = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    path = written(tmp_path / "a.dcm", pixels, **options)
    assert_same_bits(load_image(path, 2).picture, pixels)


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small.dcm",
        "examples_rgb_color.dcm",
        "examples_palette.dcm",
        "examples_ybr_color.dcm",
        "examples_overlay.dcm",
        "JPEG2000.dcm",
    ],
)
def test_files_of_pydicoms_own_tests_are_read(name):
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not in this pydicom: the others of it run")
    wide = name in ("CT_small.dcm", "JPEG2000.dcm")  # 16 bits with a sign, and no window
    image = load_image(path, 14, range="auto" if wide else None)
    assert image.picture.std() > 3
    assert image.tensor.isfinite().all()


def test_a_name_says_nothing_about_the_content(tmp_path):
    path = ct(tmp_path / "IM0001", WindowCenter=40, WindowWidth=400)
    assert_same_bits(grey(path), grey(ct(tmp_path / "a.dcm", WindowCenter=40, WindowWidth=400)))
    png = draw(tmp_path / "a.png", (4, 6), 0)
    called = tmp_path / "png.dcm"
    called.write_bytes(png.read_bytes())
    assert_same_bits(load_image(called, 2).picture, load_image(png, 2).picture)


def broken(folder):
    """Files that are no images, each with a part of its message."""
    whole = ct(folder / "whole.dcm").read_bytes()
    (folder / "whole.dcm").unlink()
    (folder / "truncated.dcm").write_bytes(whole[:-20])
    (folder / "letters.dcm").write_bytes(whole[:132])
    (folder / "noise.dcm").write_bytes(bytes(range(256)) * 4)
    (folder / "empty.dcm").touch()
    report = pydicom.dcmread(pydicom.data.get_testdata_file("reportsi.dcm", download=False))
    report.save_as(folder / "report.dcm")
    return ["truncated.dcm", "letters.dcm", "noise.dcm", "empty.dcm", "report.dcm"]


@pytest.mark.filterwarnings("ignore")  # pydicom warns of what it finds there
def test_what_is_broken_is_one_input_that_fails(first, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = broken(folder)
    for name in names:
        with pytest.raises(UnreadableFileError, match=name):
            load_image(folder / name, 2)
    ct(folder / "slice.dcm", WindowCenter=40, WindowWidth=400)
    extract(build(first).eval(), folder, tmp_path / "out")
    found = AttentionDataset(tmp_path / "out")
    assert [entry["path"] for entry in found.entries()] == ["slice.dcm"]
    assert {line["path"] for line in found.unreadable()} == set(names)


def test_too_many_pixels_are_refused_by_the_header(tmp_path):
    with pytest.raises(InvalidInputError, match="at most 23 pixels"):
        load_image(ct(tmp_path / "a.dcm"), 2, max_pixels=23)


def test_a_folder_a_tar_and_a_range_of_an_extraction(first, tmp_path):
    model = build(first).eval()
    (tmp_path / "in").mkdir()
    path = ct(tmp_path / "in" / "a.dcm")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(path, "000.dcm")
    stored = []
    for source in (tmp_path / "in", tmp_path / "shard.tar", path):
        out = tmp_path / f"out-{source.name}"
        assert "1 " in str(extract(model, source, out, range=(-160, 240), dry_run=True))
        extract(model, source, out, range=(-160, 240))
        stored.append(AttentionDataset(out)[0]["maps"])
    assert_close(stored[1], stored[0])
    assert_close(stored[2], stored[0])


def test_heatmap_draws_a_slice(imported, tmp_path):
    values = np.linspace(0, 4095, 28 * 42).reshape(28, 42).astype(np.uint16)
    path = written(tmp_path / "a.dcm", values, BitsStored=12, WindowCenter=2000, WindowWidth=1000)
    arguments = [str(path), "-o", str(tmp_path / "out"), "--random-weights", "--range", "0,2000"]
    assert main(["heatmap", *arguments]) == 0
    assert (tmp_path / "out" / "heads.png").is_file()


def test_without_pydicom_the_error_names_the_extra(tmp_path):
    path = ct(tmp_path / "a.dcm")
    code = f"""
import sys
sys.modules["pydicom"] = None
from dinov2_attn import viz
from dinov2_attn.apps.extraction.passed_over import Sieve, describe
sieve = Sieve()
assert not sieve.takes("b.dcm")
print(describe(sieve.passed_over))
try:
    viz.load_image({str(path)!r}, 14)
except Exception as error:
    print(error.hint)
"""
    done = python("-c", code, cwd=tmp_path)
    assert "1 .dcm (`pip install pydicom` makes it readable)" in done.stdout, done.stderr
    assert "pip install 'dinov2-attn[dicom]'" in done.stdout
