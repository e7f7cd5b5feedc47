"""The command line with whatever may stand on it: a status, lines of ours, and whole files only."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from dinov2_attn.apps.cli import model_options
from dinov2_attn.apps.cli.main import main
from tests.support import upstreams

EVERY_FILE = {
    "img.png",
    "attention.npy",
    "image.json",
    "run.json",
    "attn-mean.png",
    "overlay-mean.png",
    "heads.png",
    "overlay.png",
    *(f"attn-head{head}.png" for head in range(6)),
}
# Where options name two models.
COMPARED = {"compare.png", "compare.json", "attention-a.npy", "attention-b.npy", "run.json"}


@pytest.fixture(scope="module", autouse=True)
def _first():
    upstreams.FIRST.module("dinov2.models.vision_transformer")
    # The same model for each run: building it takes as long as all the rest.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_options, "build", functools.cache(model_options.build))
        yield


@pytest.fixture(scope="module")
def photograph():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (14, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    return folder


def run(*arguments):
    """Return the status of a run and the lines that it logged; anything else is raised.

    argparse leaves with 2 for arguments that it does not take.
    """
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    root, streams = logging.getLogger("dinov2_attn"), contextlib.ExitStack()
    root.addHandler(handler)
    with streams:
        streams.callback(root.removeHandler, handler)
        errors = streams.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            status = main(["heatmap", *map(str, arguments)])
        except SystemExit as leaving:
            status, lines = leaving.code, [*lines, errors.getvalue()]
    assert "Traceback" not in errors.getvalue()
    return status, "\n".join(lines)


def everything_below(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def assert_whole(folder):
    """Each folder with a file in it has them all, and nothing is left over from writing."""
    for path, folders, files in os.walk(folder):
        assert not any(name.startswith(".unfinished") for name in folders)
        assert set(files) in (set(), EVERY_FILE), path


# What a POSIX file may be called: anything without a slash. NUL is in no argument of a process.
awkward = st.sampled_from([
    "...png", "..png", ".png", "a\nb.png", "'\".png", "ñ漢字🙂.png", "é.png", "é.png", " .png",
    "%s.png", "{0}.png", "$(x).png", "*.png", "CON.png", "A.png", "a.png", "a-2.png", "a",
    "-x.png", "\u202e.png", "\udcff.png", "x" * 240 + ".png",
    "\t.png", "b.c.png", "~.png", ";.png", "\r.png",
])  # fmt: skip
names = st.one_of(
    awkward,
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=9)
    .map(lambda stem: f"{stem}.png")
    .filter(lambda name: len(name.encode()) < 200),
)
needs_posix = pytest.mark.skipif(
    sys.platform == "win32", reason="names that Windows has not; test_cli runs with plain ones"
)


@needs_posix
@given(several=st.lists(names, min_size=1, max_size=3, unique_by=str.casefold))
def test_files_of_any_name_go_into_the_output_and_nowhere_else(
    photograph, tmp_path_factory, several
):
    """Each into a folder of its own there, whatever a stem means to the file system."""
    place = tmp_path_factory.mktemp("names")
    (place / "in").mkdir()
    for name in several:
        (place / "in" / name).write_bytes(photograph)
    before = everything_below(place)
    output = place / "around" / "out"
    images = [place / "in" / name for name in several]
    status, said = run(*images, "-o", output, "--random-weights")
    assert status == 0, said
    new = everything_below(place) - before
    assert all(path.parts[:2] in {("around",), ("around", "out")} for path in new)
    assert sum(path.name == "attention.npy" for path in new) == len(several)
    assert (output / "img.png").exists() == (len(several) == 1)
    assert_whole(output)


@needs_posix
@given(
    kinds=st.lists(
        st.sampled_from(["good", "absent", "folder", "text", "empty", "loop", "long", "device"]),
        min_size=1,
        max_size=4,
    )
)
def test_inputs_that_are_no_images_are_reported_one_by_one(photograph, tmp_path_factory, kinds):
    place = tmp_path_factory.mktemp("kinds")
    images = [_input(place / f"{i}.png", kind, photograph) for i, kind in enumerate(kinds)]
    status, said = run(*images, "-o", place / "out", "--random-weights")
    bad = len(kinds) - kinds.count("good")
    assert status == (1 if bad else 0), said
    assert said.count("Found ") == bad  # a long name is shortened, with what is said of it
    if bad == len(kinds):
        assert not (place / "out").exists()
    else:
        assert_whole(place / "out")


def _input(path, kind, photograph):
    if kind == "good":
        path.write_bytes(photograph)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("text", "empty"):
        path.write_text("no pixels" if kind == "text" else "")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "long":
        return path.with_name("x" * 5000)
    elif kind == "device":
        return "/dev/null"
    return path


OUTPUTS = {
    "a file": lambda place: _touched(place / "out"),
    "below a file": lambda place: _touched(place / "file") / "out",
    "a loop": lambda place: _looped(place / "out"),
    "too long": lambda place: place / ("x" * 300),
    "not to be written": lambda place: _locked(place / "out"),
    "with a folder in the way": lambda place: _blocked(place / "out"),
}


def _touched(path):
    path.touch()
    return path


def _looped(path):
    path.symlink_to(path.name)
    return path


def _locked(path):
    path.mkdir(mode=0o500)
    if os.access(path, os.W_OK):
        pytest.skip("root may write anywhere: the other outputs are refused")
    return path


def _blocked(path):
    (path / "attn-mean.png").mkdir(parents=True)
    (path / "attention.npy").write_text("mine")
    return path


@needs_posix
@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cannot_be_is_as_it_was(photograph, tmp_path, inputs, make):
    (inputs / "image.png").write_bytes(photograph)
    output = make(tmp_path)
    before = everything_below(tmp_path)
    status, said = run(inputs / "image.png", "-o", output, "--random-weights")
    # What is in the way inside of a folder is known only when files are moved there.
    assert status == (1 if os.path.isdir(output) else 2)
    assert "Expected a folder that can be written at" in said
    assert everything_below(tmp_path) == before
    for file in tmp_path.rglob("attention.npy"):
        assert file.read_text() == "mine"


numbers = st.one_of(
    st.sampled_from(["0", "1", "14", "28", "-1", "1e3", "٣٥", "²", "", " ", "9" * 30, "9" * 5000]),
    st.integers(-5, 10**7).map(str),
    st.text(max_size=4),
)
options = st.lists(
    st.one_of(
        st.tuples(st.just("--image-size"), numbers),
        st.tuples(st.just("--image-size"), numbers, numbers),
        st.tuples(st.just("--threshold"), numbers | st.floats().map(str)),
        st.tuples(st.just("--patch-size"), numbers),
        st.tuples(st.just("--max-pixels"), numbers),
        st.tuples(st.just("--num-heads"), numbers),
        st.tuples(st.just("--arch"), st.sampled_from(["vit_small", "vit_tiny", "", "é"])),
        st.tuples(st.just("--device"), st.sampled_from(["cpu", "", "meta", "hpu", "cpu:-1", "é"])),
        st.tuples(st.sampled_from(["--registers", "--weights", "--nope", "--", "-o", "heatmap"])),
    ),
    max_size=3,
)


@given(options)
@example([("--arch", "vit_small"), ("--arch", "vit_small")])
def test_any_options_end_in_a_status(photograph, tmp_path_factory, options):
    place = tmp_path_factory.mktemp("options")
    (place / "image.png").write_bytes(photograph)
    flat = [part for option in options for part in option]
    start = [place / "image.png", "-o", place / "out", "--random-weights"]
    status, said = run(*start, *flat)
    assert status in (0, 1, 2)
    if status:
        assert "Expected" in said or "expected" in said or "usage:" in said
    if (place / "out").exists():
        files = {path.name for path in (place / "out").iterdir()}
        whole = files >= EVERY_FILE or files >= COMPARED
        assert whole or all(path.is_dir() for path in (place / "out").iterdir())


@pytest.mark.parametrize("device", ["hpu", "privateuseone", "xla", "vulkan", "mtia", "opengl", ""])
def test_a_device_that_is_not_there_is_one_line(tmp_path, inputs, photograph, device):
    (inputs / "x.png").write_bytes(photograph)
    status, said = run(inputs / "x.png", "-o", tmp_path / "out", "--device", device)
    assert status == 2
    assert "Expected a device that this torch can use" in said


def test_a_number_longer_than_python_reads_is_one_line(tmp_path):
    status, said = run("x.png", "-o", tmp_path, "--random-weights", "--image-size", "9" * 5000)
    assert status == 2
    assert "one or two lengths in pixels" in said


@given(damage=st.binary(max_size=40), where=st.sampled_from(["file", "folder", "absent"]))
def test_weights_that_are_none(photograph, tmp_path_factory, damage, where):
    place = tmp_path_factory.mktemp("weights")
    (place / "image.png").write_bytes(photograph)
    weights = {"file": place / "w.pth", "folder": place, "absent": place / "a\nb"}[where]
    (place / "w.pth").write_bytes(damage)
    status, said = run(place / "image.png", "-o", place / "out", "--weights", weights)
    assert status == 2
    assert "Expected a" in said
    assert not (place / "out").exists()
