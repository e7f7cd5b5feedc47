"""What a source lists: folders, lists, tars and images, in an order that never changes."""

from __future__ import annotations

import io
import os
import sys
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.apps.extraction.decode import Decoder, Measurer
from dinov2_attn.apps.extraction.items import list_items
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support.extraction import draw, photographs


def paths(*sources):
    return [item.path for item in list_items(sources)]


def tar_of(folder, path, mode="w"):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname=".")
    return path


def test_a_folder_is_walked_in_the_order_of_names(tmp_path):
    photographs(tmp_path / "in", 6)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    (tmp_path / "in" / ".cache").mkdir()
    draw(tmp_path / "in" / ".cache" / "thumb.png", (4, 4), 0)
    expected = ["000.png", "003.png", "a/deep/002.png", "a/deep/005.png", "b/001.png", "b/004.png"]
    assert paths(tmp_path / "in") == expected
    assert {item.source for item in list_items([tmp_path / "in"])} == {"in"}


def test_images_are_found_by_suffix_in_any_case(tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.webp", "d.Tiff", "e.txt", "f", "jpg"):
        (tmp_path / name).write_bytes(b"")
    assert paths(tmp_path) == ["a.JPG", "b.jpeg", "c.webp", "d.Tiff"]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    photographs(tmp_path / "real", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "real" / "back").symlink_to(tmp_path / "in", target_is_directory=True)
    assert paths(tmp_path / "in") == ["link/000.png"]


def test_a_link_to_itself_is_no_folder(tmp_path):
    photographs(tmp_path, 1)
    (tmp_path / "loop").symlink_to("loop")
    assert paths(tmp_path) == ["000.png"]


def test_a_broken_link_is_listed_for_a_reason_to_be_given(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (item,) = list_items([tmp_path])
    with pytest.raises(UnreadableFileError, match=r"Found gone\.png \(FileNotFoundError"):
        item.read()


def test_a_list_is_read_from_its_own_folder(tmp_path, monkeypatch):
    photographs(tmp_path / "in", 2)
    absolute = str(tmp_path / "in" / "000.png")
    (tmp_path / "list.txt").write_bytes(f"in/b/001.png\r\n\n{absolute}\nnot here\n".encode())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    items = list_items(["../list.txt"])
    assert [item.path for item in items] == ["in/b/001.png", absolute, "not here"]
    assert items[0].read() == (tmp_path / "in" / "b" / "001.png").read_bytes()
    assert items[1].read() == (tmp_path / "in" / "000.png").read_bytes()
    with pytest.raises(UnreadableFileError, match="Found not here"):
        items[2].read()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode: lists are above")
def test_names_may_be_any_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff.png")
    draw(tmp_path / "in" / "plain.png", (4, 4), 0).rename(tmp_path / "in" / name)
    (tmp_path / "list").write_bytes(b"in/" + os.fsencode(name) + b"\n")
    for source in (tmp_path / "in", tmp_path / "list", tar_of(tmp_path / "in", tmp_path / "t.tar")):
        (item,) = list_items([source])
        assert item.read() == (tmp_path / "in" / name).read_bytes()


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), min_size=1))
def test_any_line_is_a_path(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("list")
    (folder / "list").write_bytes(b"first\n" + text.encode() + b"\n")
    found = paths(folder / "list")
    assert found == ["first", *filter(None, [text.rstrip("\r")])]


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str
)
def test_a_tar_holds_the_same_images(tmp_path, form):
    folder = photographs(tmp_path / ("in" * 60), 6)  # names longer than a header's
    with tarfile.open(tmp_path / "shard-000.tar", "w", format=form) as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, arcname=path.relative_to(tmp_path).as_posix())
            note = tarfile.TarInfo(f"{path.stem}.json")
            note.size = 2
            tar.addfile(note, io.BytesIO(b"{}"))
    items = list_items([tmp_path / "shard-000.tar"])
    assert len(items) == 6
    for item in items:
        assert item.read() == (tmp_path / item.path).read_bytes()
        assert item.source == "shard-000.tar"


def test_a_tar_is_known_by_its_bytes_too(tmp_path):
    tar = tar_of(photographs(tmp_path / "in", 3), tmp_path / "dataset")
    assert len(paths(tar)) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tar, info: setattr(info, "type", tarfile.SYMTYPE),
        lambda tar, info: setattr(info, "type", tarfile.CHRTYPE),
        lambda tar, info: setattr(info, "type", tarfile.FIFOTYPE),
    ],
    ids=["link", "device", "pipe"],
)
def test_what_is_no_file_in_a_tar_is_not_opened(tmp_path, spoil):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("evil.png")
        info.linkname = "/etc/passwd"
        spoil(tar, info)
        tar.addfile(info)
    with pytest.raises(InvalidInputError, match="Expected images in"):
        paths(tmp_path / "t.tar")


def test_a_tar_that_was_cut_short_is_an_error_or_a_short_image(tmp_path):
    whole = tar_of(photographs(tmp_path / "in", 3), tmp_path / "whole.tar").read_bytes()
    items = list_items([tmp_path / "whole.tar"])
    for length in range(1, max(item.place[0] for item in items) + 10, 97):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        try:
            found = list_items([tmp_path / "cut.tar"])
        except (UnreadableFileError, InvalidInputError):
            continue
        assert [item.path for item in found] == [item.path for item in items][: len(found)]


def test_a_second_name_of_an_image_in_a_tar_is_an_image(tmp_path):
    """Any program that makes a tar stores the bytes of hard links once."""
    folder = photographs(tmp_path / "in", 2)
    os.link(folder / "000.png", folder / "twin.png")
    items = list_items([tar_of(folder, tmp_path / "t.tar")])
    assert sorted(item.path for item in items) == ["./000.png", "./b/001.png", "./twin.png"]
    for item in items:
        assert item.read() == (folder / item.path).read_bytes()


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_with_a_next_step(tmp_path, mode):
    tar = tar_of(photographs(tmp_path / "in", 3), tmp_path / f"t.tar.{mode}", f"w:{mode}")
    with pytest.raises(InvalidInputError, match="which is compressed.\nDecompress it first"):
        list_items([tar])


def test_an_image_is_a_source_and_several_sources_follow_each_other(tmp_path):
    photographs(tmp_path / "in", 2)
    one = draw(tmp_path / "one.png", (4, 4), 9)
    assert paths(one, tmp_path / "in") == ["one.png", "000.png", "b/001.png"]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda path: None, UnreadableFileError, "FileNotFoundError"),
        (lambda path: path.mkdir(), InvalidInputError, "none called"),
        (lambda path: path.write_bytes(b""), InvalidInputError, "none called"),
        (lambda path: path.write_bytes(b"\n\r\n"), InvalidInputError, "none called"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\0\0"), InvalidInputError, "none of these"),
    ],
    ids=["absent", "empty folder", "empty file", "empty lines", "binary"],
)
def test_what_is_no_source_is_an_error(tmp_path, make, error, match):
    make(tmp_path / "source")
    with pytest.raises(error, match=match):
        list_items([tmp_path / "source"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["list", "a.png"])
def test_a_pipe_is_no_source(tmp_path, name):
    """It can be read once, and a look at its first bytes would take them from the list."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidInputError, match="neither.\nWrite a list into a file first"):
        list_items([tmp_path / name])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("decoder", [Decoder, Measurer])
def test_a_pipe_among_images_is_not_waited_for(tmp_path, decoder):
    os.mkfifo(tmp_path / "pipe.png")
    (item,) = list_items([tmp_path])
    refused = decoder(2, None, None)[0, item]
    assert "found pipe.png, which is a pipe, a device or a folder" in refused.reason


def test_no_source_is_an_error():
    with pytest.raises(InvalidInputError, match="Expected a source of images"):
        list_items([])


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    """As root may read everything: one whose path is longer than the system takes."""
    monkeypatch.chdir(photographs(tmp_path / "in", 3))
    for _ in range(20):
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    with pytest.raises(UnreadableFileError, match="File name too long"):
        list_items([tmp_path / "in"])


def with_header(path, start, **changes):
    """Change the fields of a header in a tar, and its checksum."""
    content = bytearray(path.read_bytes())
    header = content[start : start + tarfile.BLOCKSIZE]
    if "size" in changes:
        header[124:136] = tarfile.itn(changes["size"], 12, tarfile.GNU_FORMAT)
    if "kind" in changes:
        header[156:157] = changes["kind"]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + tarfile.BLOCKSIZE] = header
    path.write_bytes(content)


def offsets(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Q"])
def test_a_tar_whose_sizes_lead_back_is_refused(tmp_path, kind):
    photographs(tmp_path / "in", 3)
    tar = tar_of(tmp_path / "in", tmp_path / "a.tar")
    _, second, *_, last = offsets(tar)
    with_header(tar, last, size=second - last - tarfile.BLOCKSIZE, kind=kind)
    with pytest.raises(UnreadableFileError, match="a size of -"):
        list_items([tar])


@pytest.mark.parametrize("size", [2**40, 2**63, 2**87])
def test_a_tar_with_a_member_beyond_all_files(tmp_path, size):
    photographs(tmp_path / "in", 3)
    tar = tar_of(tmp_path / "in", tmp_path / "a.tar")
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME):
        with_header(tar, 0, size=size, kind=kind)
        with pytest.raises((UnreadableFileError, InvalidInputError)):
            list_items([tar])


def test_a_tar_of_headers_in_headers(tmp_path):
    nested = tarfile.TarInfo._create_gnu_long_header("a", tarfile.GNUTYPE_LONGNAME, "utf-8", "")
    (tmp_path / "a.tar").write_bytes(nested * 2000)
    with pytest.raises(UnreadableFileError):
        list_items([tmp_path / "a.tar"])
