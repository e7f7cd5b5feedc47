"""Every writer replaces files only: links stay and are followed, pipes and devices are refused."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

import pytest
from PIL import Image

from dinov2_attn import AttentionDataset, extract, viz
from dinov2_attn._files import atomic_file, write_file
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz import heatmap
from dinov2_attn.errors import UnreadableFileError, UnwritableOutputError
from tests.support.extraction import build, photographs
from tests.support.figure_probes import artifacts_at, maps_on, photograph_on

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")

GRID = (3, 5)
MINE = b"mine"


def figure_of(maps):
    return viz.figure(maps, photograph_on(GRID), width=2)


def in_folder(path):
    heatmap.write(path.parent, {path.name: lambda file: Image.new("RGB", (2, 2)).save(file)})


# What is written from Python, by the suffix of its file.
WRITERS = {
    "maps": (".safetensors", lambda maps, path: maps.save(path)),
    "figure": (".png", lambda maps, path: viz.save(viz.plot_heads(maps), path)),
    "drawing": (".svg", lambda maps, path: viz.save(viz.plot_heads(maps), path)),
    "film": (".gif", lambda maps, path: viz.animate(maps, path)),
    "paper": (".pdf", lambda maps, path: figure_of(maps).save(path)),
    "caption": (".txt", lambda maps, path: figure_of(maps).save(path.with_suffix(".svg"))),
    "page": (".html", lambda maps, path: viz.explore(maps, photograph_on(GRID)).save(path)),
    "picture in a folder": (".png", lambda maps, path: in_folder(path)),
}
every_writer = pytest.mark.parametrize("writer", WRITERS)


def write(writer, folder, name="out"):
    """Write a file called ``name`` in ``folder`` and return its path."""
    suffix, act = WRITERS[writer]
    path = folder / f"{name}{suffix}"
    act(maps_on(GRID), path)
    return path


def path_of(writer, folder, name="out"):
    return folder / f"{name}{WRITERS[writer][0]}"


def pipe(path, elsewhere):
    os.mkfifo(path)


def link_to_pipe(path, elsewhere):
    os.mkfifo(elsewhere / "pipe")
    path.symlink_to(elsewhere / "pipe")


def links_to_pipe(path, elsewhere):
    link_to_pipe(elsewhere / "second", elsewhere)
    (elsewhere / "first").symlink_to("second")
    path.symlink_to(elsewhere / "first")


def folder_to_pipe(path, elsewhere):
    """A pipe in a folder that is a link."""
    (elsewhere / "deep").mkdir()
    os.mkfifo(elsewhere / "deep" / "pipe")
    (elsewhere / "way").symlink_to("deep")
    path.symlink_to(elsewhere / "way" / "pipe")


def socket_there(path, elsewhere):
    before = os.getcwd()
    os.chdir(path.parent)  # a name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def link_to_socket(path, elsewhere):
    socket_there(elsewhere / "socket", elsewhere)
    path.symlink_to(elsewhere / "socket")


def folder(path, elsewhere):
    path.mkdir()


def link_to_folder(path, elsewhere):
    path.symlink_to(elsewhere)


def circle(path, elsewhere):
    path.symlink_to(path.name)


def circle_of_two(path, elsewhere):
    (elsewhere / "other").symlink_to(path)
    path.symlink_to(elsewhere / "other")


def link_below_a_file(path, elsewhere):
    (elsewhere / "file").write_bytes(MINE)
    path.symlink_to(elsewhere / "file" / "below")


def link_into_nothing(path, elsewhere):
    path.symlink_to(elsewhere / "missing" / "file")


def link_to_a_long_name(path, elsewhere):
    path.symlink_to(elsewhere / ("x" * 300))


def open_file_without_a_name(path, elsewhere):
    (elsewhere / "gone").write_bytes(MINE)
    number = os.open(elsewhere / "gone", os.O_RDONLY)
    (elsewhere / "gone").unlink()
    path.symlink_to(f"/proc/self/fd/{number}")
    return lambda: os.close(number)


REFUSED = [
    *(pipe, link_to_pipe, links_to_pipe, folder_to_pipe, socket_there, link_to_socket),
    *(folder, link_to_folder, circle, circle_of_two, link_below_a_file, link_into_nothing),
    *(link_to_a_long_name, open_file_without_a_name),
]


def seen(place):
    """Everything below ``place``: its kind, and its content or where it leads."""
    found = {}
    for path in sorted(place.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if stat.S_ISLNK(mode) else None
        found[path.relative_to(place).as_posix()] = (
            stat.S_IFMT(mode),
            path.read_bytes() if stat.S_ISREG(mode) else content,
        )
    return found


@pytest.fixture
def place(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


@every_writer
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_no_file_is_refused_and_stays(place, writer, make):
    path = path_of(writer, place / "here")
    after = make(path, place / "elsewhere")
    before = seen(place)
    try:
        with pytest.raises(UnwritableOutputError) as caught:
            write(writer, place / "here")
    finally:
        if after is not None:
            after()
    assert str(place / "here") in caught.value.expected
    assert "ame another" in caught.value.hint or "another path" in caught.value.hint
    assert seen(place) == before


def test_the_error_says_what_is_there_and_behind_which_link(place):
    links_to_pipe(place / "here" / "out.html", place / "elsewhere")
    found = f"a pipe behind the link to {place / 'elsewhere' / 'pipe'}, which is not a file"
    with pytest.raises(UnwritableOutputError, match=found):
        write("page", place / "here")


@every_writer
@pytest.mark.parametrize("chain", [1, 3])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_file_stays_and_its_file_is_replaced(place, writer, chain, there):
    plain = write(writer, place / "here", "plain").read_bytes()
    target = place / "elsewhere" / "file"
    if there:
        target.write_bytes(MINE)
        target.chmod(0o600)
    links = [*(place / "elsewhere" / f"{i}" for i in range(chain - 1))]
    for link, end in zip([path_of(writer, place / "here"), *links], [*links, target], strict=True):
        link.symlink_to(os.path.relpath(end, link.parent))
    path = write(writer, place / "here")
    assert path.is_symlink()
    assert all(link.is_symlink() for link in links)
    # Those of safetensors are in any order.
    assert target.read_bytes() == plain or writer == "maps"
    assert len(path.read_bytes()) == len(plain)
    assert not there or stat.S_IMODE(target.stat().st_mode) == 0o600
    assert len(list((place / "elsewhere").iterdir())) == chain


@every_writer
def test_another_name_of_a_file_keeps_what_it_has(place, writer):
    """A rename makes a new file: who has the old one open or linked does not see half of one."""
    (place / "elsewhere" / "other").write_bytes(MINE)
    os.link(place / "elsewhere" / "other", path_of(writer, place / "here"))
    assert write(writer, place / "here").read_bytes() != MINE
    assert (place / "elsewhere" / "other").read_bytes() == MINE


@every_writer
def test_a_full_disk_leaves_what_was_there(place, writer):
    path = path_of(writer, place / "here")
    path.write_bytes(MINE)
    whole = len(write(writer, place / "elsewhere").read_bytes())
    before = seen(place)
    for most in (0, whole // 2, whole - 1):
        assert in_a_child(lambda: write(writer, place / "here"), most) == 3
        assert seen(place) == before


def in_a_child(act, most):
    """Return 3 where ``act`` raised our error in a process whose files have ``most`` bytes."""
    import resource

    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        status = 1
        with contextlib.suppress(BaseException):
            try:
                act()
            except UnwritableOutputError:
                status = 3
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@every_writer
@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_our_error(place, writer, name):
    if writer == "picture in a folder" and "\0" in name:
        pytest.skip("names in a folder are ours")
    with pytest.raises(UnwritableOutputError):
        write(writer, place / "here", name)
    assert seen(place) == {"here": (stat.S_IFDIR, None), "elsewhere": (stat.S_IFDIR, None)}


def test_one_of_several_that_is_refused_brings_all_back(place):
    here, there = place / "here", place / "elsewhere"
    (there / "a").write_bytes(MINE)
    (here / "a").symlink_to(there / "a")
    (here / "b").symlink_to("a")  # both are written, into one file
    os.mkfifo(here / "c")
    before = seen(place)
    files = {name: lambda path: path.write_text(path.name) for name in "abc"}
    with pytest.raises(UnwritableOutputError):
        heatmap.write(here, files)
    assert seen(place) == before
    os.unlink(here / "c")
    heatmap.write(here, files)
    assert (there / "a").read_text() == "b"
    assert (here / "c").read_text() == "c"
    assert sorted(os.listdir(here)) == ["a", "b", "c"]


def test_a_pipe_that_comes_while_a_file_is_made_stays(place):
    path = place / "here" / "out"

    def piped():
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(MINE)
            os.mkfifo(path)

    with pytest.raises(OSError, match="a pipe"):
        piped()
    assert os.listdir(place / "here") == ["out"]
    assert path.is_fifo()


def test_missing_folders_are_made_and_a_link_to_no_folder_is_refused(place):
    write_file(place / "here" / "new" / "deep" / "file", MINE)
    assert (place / "here" / "new" / "deep" / "file").read_bytes() == MINE
    (place / "here" / "link").symlink_to(place / "nowhere")
    with pytest.raises(UnwritableOutputError):
        write_file(place / "here" / "link" / "file", MINE)
    assert not (place / "nowhere").exists()


# Commands


COMMANDS = {
    "heatmap": ("out", "out/attn-mean.png"),
    "explore": ("out.html", "out.html"),
    "figure": ("out.pdf", "out.pdf"),
    "caption": ("out.pdf", "out.txt"),
}


@pytest.fixture
def command(imported, image, weights, place, monkeypatch):
    monkeypatch.chdir(place / "here")

    def run(name):
        output, written = COMMANDS[name]
        verb = "figure" if name == "caption" else name
        options = ["--weights", weights, "--image-size", "28", "42"]
        layers = [] if verb == "figure" else ["--layers", "11"]
        path = place / "here" / written
        path.parent.mkdir(exist_ok=True)
        return path, lambda: main([verb, *map(str, [image, "-o", output, *options, *layers])])

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_a_link_to_a_pipe(command, place, name, caplog):
    path, run = command(name)
    link_to_pipe(path, place / "elsewhere")
    before = seen(place)
    assert run() in (1, 2)  # 1 if one of several images fails
    assert "a pipe behind the link to" in caplog.text
    assert seen(place) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_through_a_link(command, place, name):
    path, run = command(name)
    (place / "elsewhere" / "file").write_bytes(MINE)
    path.symlink_to(place / "elsewhere" / "file")
    assert run() == 0
    assert path.is_symlink()
    assert (place / "elsewhere" / "file").read_bytes() not in (b"", MINE)
    assert os.listdir(place / "elsewhere") == ["file"]


def test_reports_of_verify_are_looked_at_before_hours_of_work(place, caplog):
    for option in ("--json", "--junit"):
        assert main(["verify", str(place / "nothing"), option, str(place / "here")]) == 2
        assert "a folder, which is not a file" in caplog.text
        caplog.clear()


# A folder of an extraction


@pytest.fixture
def extracted(first, tmp_path):
    model = build(first)
    source = photographs(tmp_path / "in", 6)
    return lambda out: extract(model, source, out, shard_size=4)


@pytest.mark.parametrize("name", ["extraction.json", "shards/00000.jsonl", ".lock", "index.jsonl"])
def test_an_extraction_refuses_pipes_in_its_folder(extracted, tmp_path, name):
    extracted(tmp_path / "out")
    (tmp_path / "out" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "elsewhere")
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    before = seen(tmp_path)
    with pytest.raises((UnwritableOutputError, UnreadableFileError)):
        extracted(tmp_path / "out")
    assert seen(tmp_path) == before


def test_a_lock_that_is_a_link_truncates_nothing(extracted, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_bytes(MINE)
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UnwritableOutputError, match=r"\.lock"):
        extracted(tmp_path / "out")
    assert (tmp_path / "mine").read_bytes() == MINE


def test_shards_and_sheets_go_through_links(extracted, tmp_path):
    extracted(tmp_path / "plain")
    extracted(tmp_path / "out")
    (tmp_path / "out" / "shards").rename(tmp_path / "disk")
    (tmp_path / "out" / "shards").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "00000.jsonl").unlink()
    (tmp_path / "out" / "index.jsonl").rename(tmp_path / "disk" / "index")
    (tmp_path / "out" / "index.jsonl").symlink_to(tmp_path / "disk" / "index")
    (tmp_path / "disk" / "index").write_bytes(MINE)
    extracted(tmp_path / "out")
    assert (tmp_path / "out" / "index.jsonl").is_symlink()
    found, expected = (dict(seen(tmp_path / name)) for name in ("disk", "plain/shards"))
    assert found.pop("index")[1] == (tmp_path / "plain" / "index.jsonl").read_bytes()
    assert found.keys() == expected.keys()
    (tmp_path / "sheet.html").symlink_to(tmp_path / "disk" / "sheet.html")
    AttentionDataset(tmp_path / "out").sheet().save(tmp_path / "sheet.html")
    assert (tmp_path / "disk" / "sheet.html").read_bytes().startswith(b"<!")
    assert (tmp_path / "sheet.html").is_symlink()


def test_artifacts_are_written_as_maps_are(place):
    os.mkfifo(place / "here" / "a")
    with pytest.raises(UnwritableOutputError, match="a pipe"):
        artifacts_at(GRID).save(place / "here" / "a")
