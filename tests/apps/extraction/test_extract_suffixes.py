"""What ``extract`` takes by name, what it makes of it by content, and what it says it left."""

from __future__ import annotations

import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from dinov2_attn import extract
from dinov2_attn.apps.extraction.items import list_items
from dinov2_attn.apps.extraction.passed_over import Sieve, describe, image_suffixes
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.errors import InvalidInputError
from tests.support.extraction import build, draw, files_of, index_of, photographs, stored
from tests.support.tolerances import assert_close

WRITTEN = ["jpg", "jfif", "jpe", "JPEG", "tga", "icb", "webp", "pcx", "dib", "sgi", "bmp", "gif"]
WRITTEN += ["ppm", "pnm", "TIF", "jp2", "j2k", "ico", "qoi", "png", "apng", "mpo", "dds"]


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


def paths(*sources, sieve=None):
    return [item.path for item in list_items(sources, sieve)]


def passed_over(*sources):
    sieve = Sieve()
    paths(*sources, sieve=sieve)
    return sieve.passed_over


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_every_suffix_that_pillow_can_write_is_read(model, tmp_path):
    one = Image.open(draw(tmp_path / "one.png", (16, 16), 0))
    (tmp_path / "in").mkdir()
    for suffix in WRITTEN:
        one.save(tmp_path / "in" / f"{suffix}.{suffix}")
    done = extract(model, tmp_path / "in", tmp_path / "out")
    assert (done.images, done.unreadable) == (len(WRITTEN), 0)
    assert done.passed_over == {}


def test_the_suffixes_are_those_of_pillow():
    assert image_suffixes() >= {".jfif", ".jpe", ".mpo", ".tga", ".webp", ".psd", ".fits", ".icns"}
    assert not image_suffixes() & {".eps", ".ps", ".pdf", ".mp3", ".h5", ".grib", ".txt"}


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "PNG"), ("b.tga", "JPEG"), ("c.gif", "BMP")])
def test_the_content_decides_the_format(model, tmp_path, name, kind):
    one = Image.open(draw(tmp_path / "one.png", (6, 4), 0))
    (tmp_path / "in").mkdir()
    one.save(tmp_path / "in" / name, kind)
    assert extract(model, tmp_path / "in", tmp_path / "out").unreadable == 0
    ((entry, maps, _),) = stored(tmp_path / "out")
    tensor = load_image(tmp_path / "in" / name, 2).tensor[None]
    weights = model.get_last_self_attention(tensor, queries="cls").detach()
    assert entry["path"] == name
    assert_close(maps[0].flatten(-2), weights[0, ..., 1:], size=1.0)


def test_what_is_passed_over_is_counted_by_suffix(tmp_path):
    photographs(tmp_path / "in", 4)
    fill(tmp_path / "in", "a.mp3", "b/b.MP3", "c.mp3", "notes.txt", "README", "b/Makefile", "x.")
    fill(tmp_path / "in", ".hidden", ".git/config", "._a.mp3", "a.tar.gz", "p.pdf", "q.eps")
    found = passed_over(tmp_path / "in")
    assert found == {".mp3": 3, "": 3, ".txt": 1, ".gz": 1, ".pdf": 1, ".eps": 1}
    said = describe(found)
    assert said.startswith("passed over: 3 without suffix, 3 .mp3, 1 .eps, 1 .gz")


def test_links_count_as_what_they_are_called(tmp_path):
    photographs(tmp_path / "real", 3)
    fill(tmp_path / "real", "film.wav")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "in" / "A.PNG").symlink_to(tmp_path / "real" / "000.png")
    (tmp_path / "in" / "film.wav").symlink_to(tmp_path / "nowhere")
    sieve = Sieve()
    assert len(paths(tmp_path / "in", sieve=sieve)) == 4
    assert sieve.passed_over == {".wav": 2}


def test_its_own_output_is_not_counted_as_passed_over(model, tmp_path):
    photographs(tmp_path, 5)
    fill(tmp_path, "b/film.wav")
    first = extract(model, tmp_path, tmp_path / "out", shard_size=2)
    again = extract(model, tmp_path, tmp_path / "out", shard_size=2)
    assert first.passed_over == again.passed_over == {".wav": 1}
    assert (again.images, again.seen) == (5, 0)


def test_files_that_appear_later_do_not_change_the_extraction(model, tmp_path):
    photographs(tmp_path / "in", 5)
    extract(model, tmp_path / "in", tmp_path / "out")
    before = files_of(tmp_path / "out")
    fill(tmp_path / "in", "notes.txt")
    assert extract(model, tmp_path / "in", tmp_path / "out").passed_over == {".txt": 1}
    assert files_of(tmp_path / "out") == before


def test_the_summary_and_the_preview_list_passed_over_files(model, tmp_path):
    photographs(tmp_path / "in", 4)
    fill(tmp_path / "in", "a.mp3", "b.mp3", "c.txt", "d")
    promised = extract(model, tmp_path / "in", tmp_path / "out", dry_run=True)
    done = extract(model, tmp_path / "in", tmp_path / "out")
    expected = {".mp3": 2, "": 1, ".txt": 1}
    assert promised.passed_over == done.passed_over == expected
    for said in (str(promised), str(done)):
        assert said.endswith("passed over: 2 .mp3, 1 without suffix, 1 .txt")


def test_a_tar_counts_too(tmp_path):
    photographs(tmp_path / "in", 3)
    fill(tmp_path / "in", "0.json", "1.json", "0.cls", "._0.cls")
    (tmp_path / "in" / "link.png").symlink_to("000.png")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
    assert passed_over(tmp_path / "t.tar") == {".json": 2, ".cls": 1, "links and devices": 1}
    # Videos in a tar are never read, so that no library is named for them.
    (tmp_path / "clip.mp4").write_bytes(b"a film")
    with tarfile.open(tmp_path / "v.tar", "w") as tar:
        tar.add(tmp_path / "clip.mp4", arcname="clip.mp4")
        tar.add(tmp_path / "in" / "000.png", arcname="000.png")
    assert passed_over(tmp_path / "v.tar") == {".mp4 in a tar": 1}
    assert describe({".mp4 in a tar": 1}) == "passed over: 1 .mp4 in a tar"


def test_a_list_takes_what_it_names(model, tmp_path):
    one = draw(tmp_path / "one.png", (6, 4), 0)
    shutil.copy(one, tmp_path / "no-suffix")
    shutil.copy(one, tmp_path / "two.dat")
    (tmp_path / "list.txt").write_text("one.png\nno-suffix\ntwo.dat\n")
    done = extract(model, tmp_path / "list.txt", tmp_path / "out")
    assert (done.images, done.unreadable, done.passed_over) == (3, 0, {})


def test_a_single_file_is_recognised_by_its_content(tmp_path):
    one = draw(tmp_path / "one.png", (6, 4), 0)
    shutil.copy(one, tmp_path / "photo")
    shutil.copy(one, tmp_path / "photo.dat")
    assert paths(tmp_path / "photo", tmp_path / "photo.dat") == ["photo", "photo.dat"]


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\nmoveto\n", b"%PDF-1.4\nx\n"])
def test_a_program_is_no_list_of_paths(tmp_path, content):
    (tmp_path / "a.eps").write_bytes(content)
    with pytest.raises(InvalidInputError, match="none of these"):
        list_items([tmp_path / "a.eps"])


@pytest.mark.usefixtures("no_plugins")
def test_many_suffixes_are_counted_together():
    said = describe({f".{i:03}": 1 for i in range(25)} | {".jxl": 2})
    assert said.count(",") == 10
    assert said.endswith("16 with 16 others")


# Plug-ins


HEIC = b"\0\0\0\x18ftypheic" + b"\0" * 40


@pytest.fixture
def no_plugins(monkeypatch):
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    for kind in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, kind, raising=False)
    extensions = {s: k for s, k in Image.EXTENSION.items() if k not in ("HEIF", "JXL")}
    monkeypatch.setattr(Image, "EXTENSION", extensions)


@pytest.mark.usefixtures("no_plugins")
def test_a_plugin_that_is_missing_is_named(tmp_path):
    photographs(tmp_path / "in", 2)
    (tmp_path / "in" / "IMG_0001.HEIC").write_bytes(HEIC)
    fill(tmp_path / "in", *(f"{i}.{chr(97 + i)}" for i in range(12)))
    found = passed_over(tmp_path / "in")
    assert found[".heic"] == 1
    assert "1 .heic (`pip install pillow-heif` makes it readable)" in describe(found)
    assert "`pip install pillow-jxl-plugin`" in describe({".txt": 3, ".jxl": 2})


@pytest.mark.usefixtures("no_plugins")
def test_the_error_for_a_source_without_images_lists_the_others(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "IMG_0001.HEIC").write_bytes(HEIC)
    with pytest.raises(InvalidInputError, match="(?s)none called .*pip install pillow-heif"):
        list_items([tmp_path / "in"])
    with pytest.raises(InvalidInputError, match="pip install pillow-heif"):
        list_items([tmp_path / "in" / "IMG_0001.HEIC"])


def test_a_plugin_that_is_there_reads(model, tmp_path, monkeypatch):
    """A reader of bytes of its own, registered as pillow_heif registers its own."""
    plugin = types.ModuleType("pillow_heif")

    def register_heif_opener():
        Image.register_open(
            "HEIF", lambda fp, name: _solid(), lambda start: start[4:12] == b"ftypheic"
        )
        Image.register_extension("HEIF", ".heic")

    def _solid():
        return Image.fromarray(np.full((6, 4, 3), 90, dtype=np.uint8))

    plugin.register_heif_opener = register_heif_opener
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    without = {kind: how for kind, how in Image.OPEN.items() if kind != "HEIF"}
    monkeypatch.setattr(Image, "OPEN", without)
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    photographs(tmp_path / "in", 2)
    (tmp_path / "in" / "IMG_0001.HEIC").write_bytes(HEIC)
    done = extract(model, tmp_path / "in", tmp_path / "out")
    assert (done.images, done.unreadable, done.passed_over) == (3, 0, {})


# Globs


def test_a_glob_is_what_it_matches(model, tmp_path):
    folder = photographs(tmp_path / "in", 6)
    fill(folder, "b/notes.txt")
    assert paths(str(folder / "*" / "*.png")) == ["b/001.png", "b/004.png"]
    assert paths(f"{folder}/**/*.png") == paths(folder)
    assert paths(folder / "[ab]*") == ["a/deep/002.png", "a/deep/005.png", "b/001.png", "b/004.png"]
    assert passed_over(f"{folder}/*/*") == {".txt": 1}
    assert {item.source for item in list_items([f"{folder}/*.png"])} == {"in"}
    extract(model, folder, tmp_path / "whole")
    extract(model, f"{folder}/**", tmp_path / "globbed")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "globbed")
    assert len(index_of(tmp_path / "globbed")) == 6


def test_a_glob_may_match_tars(tmp_path):
    for shard in ("0", "1"):
        photographs(tmp_path / shard, 3)
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            tar.add(tmp_path / shard, arcname=".")
    assert len(paths(tmp_path / "train-*.tar")) == 6


def test_a_name_with_brackets_is_a_name(tmp_path):
    photographs(tmp_path / "in [2024]", 2)
    assert paths(tmp_path / "in [2024]") == ["000.png", "b/001.png"]


def test_a_glob_without_matches_is_an_error(tmp_path):
    with pytest.raises(InvalidInputError, match=r"(?s)Expected images in .*\*\.png"):
        list_items([f"{tmp_path}/*.png"])
