"""Videos: frames and their times, the film of the attention, and what is broken."""

from __future__ import annotations

import contextlib
import json
import os
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.viz import videos
from dinov2_attn.apps.viz.film_of_video import fitted
from dinov2_attn.apps.viz.videos import FrameReader, Sampling, images_in, open_video, times_of
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support.bright_patch import GRID
from tests.support.videos import (
    bright,
    hide,
    read_video,
    turned,
    without_beginning,
    write_frames,
    write_video,
)

pytest.importorskip("matplotlib")
pytest.importorskip("av")
pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, weights
IRREGULAR = [0, 40, 80, 400, 440, 600]
PATCHES = [(1, 5), (0, 0), (3, 6), (2, 3), (1, 1), (0, 6)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Six frames, each with a bright patch at another place."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, [bright(patch) for patch in PATCHES])


def film(video, out, weights, *options):
    return main(["heatmap", str(video), "-o", str(out), "--weights", str(weights), *options])


def brightest(frame):
    """Return the patch of a frame that is brightest."""
    height, width = (frame.shape[0] // GRID[0], frame.shape[1] // GRID[1])
    cells = frame.astype(int).sum(2).reshape(GRID[0], height, GRID[1], width).mean((1, 3))
    return divmod(int(cells.argmax()), GRID[1])


# Reading


def test_frames_have_their_numbers_and_times(clip):
    frames = list(open_video(clip).frames())
    assert [frame.number for frame in frames] == list(range(6))
    assert [frame.time for frame in frames] == [Fraction(i, 10) for i in range(6)]
    assert [brightest(frame.pixels) for frame in frames] == PATCHES
    assert times_of(clip) == [frame.time for frame in frames]


@pytest.mark.parametrize(
    ("sampling", "numbers"),
    [
        (Sampling(every=2), [0, 2, 4]),
        (Sampling(every=4), [0, 4]),
        (Sampling(fps=Fraction(5)), [0, 2, 4]),
        (Sampling(fps=Fraction(3)), [0, 4]),
        (Sampling(fps=Fraction(100)), list(range(6))),
        (Sampling(every=10), [0]),
    ],
)
def test_some_frames_are_taken_at_their_times(clip, sampling, numbers):
    video = open_video(clip, sampling)
    frames = list(video.frames())
    assert [frame.number for frame in frames] == numbers
    assert [frame.time for frame in frames] == [Fraction(i, 10) for i in numbers]
    assert video.count == len(numbers)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_video_is_upright(clip, tmp_path, degrees):
    path = tmp_path / "turned.mp4"
    path.write_bytes(clip.read_bytes())
    first = next(open_video(turned(path, degrees)).frames()).pixels
    # A player turns clockwise by these degrees.
    expected = np.rot90(next(open_video(clip).frames()).pixels, -degrees // 90)
    assert np.abs(first.astype(int) - expected).max() == 0


def test_a_frame_is_read_by_its_number_in_any_order(clip):
    read = FrameReader()
    for number in (0, 3, 4, 1, 5, 5):
        assert brightest(read(clip, number)) == PATCHES[number]
    with pytest.raises(UnreadableFileError, match="frame 6"):
        read(clip, 6)


def test_frames_that_are_not_there_are_not_decoded_again(clip, monkeypatch):
    decoded, begun = videos._decoded, []
    monkeypatch.setattr(videos, "_decoded", lambda *args: begun.append(args) or decoded(*args))
    read = FrameReader()
    for number in (6, 7, 8):
        with pytest.raises(UnreadableFileError):
            read(clip, number)
    assert len(begun) == 1


def test_hidden_frames_of_vp8_do_not_count(tmp_path):
    path = write_video(tmp_path / "a.webm", [bright(patch) for patch in PATCHES], codec="libvpx")
    hide(path, 2)
    times = times_of(path)
    assert times == [frame.time for frame in open_video(path).frames()]
    assert len(times) == open_video(path).count == 5
    read = FrameReader()
    shown = [patch for number, patch in enumerate(PATCHES) if number != 2]
    assert [brightest(read(path, number)) for number in range(5)] == shown


def test_frames_behind_those_that_need_others_keep_their_numbers(tmp_path):
    patches = [divmod(i, GRID[1]) for i in range(24)]
    whole = [bright(patch) for patch in patches]
    path = write_video(tmp_path / "a.mkv", whole, rate=25, codec="mpeg2video")
    path = without_beginning(path, 5)
    count, read, found = len(times_of(path)), FrameReader(), {}
    for number in range(count):
        with contextlib.suppress(UnreadableFileError):
            found[number] = brightest(read(path, number))
    assert 0 < len(found) < count == 19
    assert found == {number: patches[5 + number] for number in found}
    assert max(found) == count - 1
    with pytest.raises(UnreadableFileError, match="leaves it out"):
        read(path, 0)


def test_no_frame_is_lost_where_times_are_rounded_to_milliseconds():
    times = [(number, Fraction(round(number * 1000 / 30), 1000)) for number in range(60)]
    assert list(Sampling(fps=Fraction(30)).of(times)) == list(range(60))


def test_frames_of_12_bits_are_read_in_their_range(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.fromarray(np.full((4, 4), 2048, np.uint16)).save(folder / "0.png")
    (frame,) = open_video(folder, values=(0, 4095)).frames()
    assert set(frame.pixels.flatten().tolist()) == {128}


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    folder = write_frames(tmp_path / "frames", [bright((0, i % 7)) for i in range(12)])
    (folder / "notes.txt").write_text("no frame")
    assert [path.name for path in images_in(folder)][:3] == ["f0.png", "f1.png", "f2.png"]
    video = open_video(folder)
    assert (video.rate, video.count) == (25, 12)
    assert [frame.time for frame in video.frames()][1] == Fraction(1, 25)


def test_frames_of_other_sizes_are_refused(tmp_path):
    folder = write_frames(tmp_path / "frames", [bright((0, 0)), bright((0, 0))[:28]])
    with pytest.raises(InvalidInputError, match="frames of one size"):
        list(open_video(folder).frames())


def test_a_frame_with_too_many_pixels_is_refused(clip):
    with pytest.raises(InvalidInputError, match="at most 100 pixels"):
        open_video(clip, max_pixels=100)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: b"", "can be decoded"),
        (lambda whole: b"no video" * 100, "can be decoded"),
        (lambda whole: whole[: len(whole) * 6 // 10], "which ends after"),
        (lambda whole: whole[:100], "without any frame"),
    ],
)
def test_what_is_broken_is_said(clip, tmp_path, content, said):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content(clip.read_bytes()))
    with pytest.raises(UnreadableFileError, match=said):
        open_video(path)


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((56, 98), None, (56, 98)),
        ((97, 195), None, (98, 196)),
        ((1080, 1920), None, (518, 924)),
        ((1920, 1080), 224, (392, 224)),
        ((100, 100), (30, 50), (28, 56)),
        ((4, 4), None, (14, 14)),
    ],
)
def test_frames_are_stretched_to_the_nearest_whole_patches(size, wanted, expected):
    assert fitted(size, (14, 14), wanted) == expected


# Films


@pytest.mark.usefixtures("imported")
def test_a_folder_is_named_as_it_is_called(weights, tmp_path, monkeypatch):
    folder = write_frames(tmp_path / "frames", [bright((0, 0))] * 2)
    monkeypatch.chdir(folder)
    assert film(".", "../film", weights) == 0
    assert "2 frames of frames" in (tmp_path / "film" / "film.txt").read_text()


@pytest.mark.parametrize("options", [["--head", "1"], ["--every", "2"], ["--film", "side"]])
def test_options_of_films_are_refused_for_images(weights, tmp_path, caplog, options):
    Image.fromarray(bright((0, 0))).save(tmp_path / "a.png")
    assert film(tmp_path / "a.png", tmp_path / "out", weights, *options) != 0
    assert options[0] in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("imported")
def test_a_film_has_the_times_the_size_and_the_patch_of_each_frame(weights, tmp_path):
    frames = [bright(patch)[:-1] for patch in PATCHES]  # 55 rows
    video = write_video(tmp_path / "a.mkv", [f[:54, :98] for f in frames], times=IRREGULAR)
    assert film(video, tmp_path / "out", weights) == 0
    shown, times, about, streams = read_video(tmp_path / "out" / "film.mp4")
    assert about[:2] == (54, 98)
    assert about[3] == "yuv420p"
    assert times == pytest.approx([time / 1000 for time in IRREGULAR])
    assert streams == 1
    cells = [np.pad(frame, ((0, 2), (0, 0), (0, 0)), "edge") for frame in shown]
    assert [brightest(frame) for frame in cells] == PATCHES
    maps = np.load(tmp_path / "out" / "attention.npy")
    assert maps.shape == (6, *GRID)
    assert [divmod(int(one.argmax()), GRID[1]) for one in maps] == PATCHES
    caption = (tmp_path / "out" / "film.txt").read_text("utf-8")
    assert "in all frames" in caption
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record["files"]) == {"film.mp4", "film.txt", "attention.npy"}


@pytest.mark.usefixtures("imported")
def test_looks_tokens_heads_and_folders(weights, tmp_path):
    folder = write_frames(tmp_path / "frames", [bright(patch)[:, :97] for patch in PATCHES[:3]])
    options = ("--film", "side", "--queries", "cls", "1,2", "--head", "2", "--fps", "10")
    assert film(folder, tmp_path / "out", weights, *options) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"film.mp4", "film-1-2.mp4", "attention-1-2.npy"} <= names
    shown, _, about, _ = read_video(tmp_path / "out" / "film.mp4")
    assert about[:3] == (56, 192, 10)
    assert np.abs(shown[1][:, :90].astype(int) - bright(PATCHES[1])[:, :90]).mean() < 8
    assert film(folder, tmp_path / "out", weights, "--film", "overlay", "--cmap", "gray") == 0
    assert not (tmp_path / "out" / "film-1-2.mp4").exists()
    shown, *_ = read_video(tmp_path / "out" / "film.mp4")
    assert np.ptp(shown[0].astype(int), axis=2).max() < 12, "grey below grey"


@pytest.mark.usefixtures("imported")
def test_a_film_of_random_weights_says_so_in_every_frame(clip, tmp_path):
    assert main(["heatmap", str(clip), "-o", str(tmp_path), "--random-weights"]) == 0
    for frame in read_video(tmp_path / "film.mp4")[0]:
        red, green, blue = frame[-3:].reshape(-1, 3).mean(0)
        assert red > 100
        assert max(green, blue) < 80
    assert "RANDOM WEIGHTS" in (tmp_path / "film.txt").read_text("utf-8")


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_frames_of_which_no_even_side_is_left_are_refused(size, weights, tmp_path, caplog):
    folder = write_frames(tmp_path / "frames", [np.zeros((*size, 3), np.uint8)] * 2)
    assert film(folder, tmp_path / "out", weights, "--film", "side") == 1
    assert "frames of at least 2 × 2 pixels" in caplog.text
    assert not (tmp_path / "out").exists()
    whole = write_frames(tmp_path / "whole", [np.zeros((2, 3, 3), np.uint8)] * 2)
    assert film(whole, tmp_path / "out", weights) == 0


@pytest.mark.usefixtures("imported")
def test_captions_name_tokens_and_videos_as_those_of_pictures(weights, tmp_path):
    video = write_video(tmp_path / "a\n\x1b[31mb.mp4", [bright((0, 0))])
    assert film(video, tmp_path / "out", weights, "--queries", "cls", "1,2") == 0
    caption = (tmp_path / "out" / "film.txt").read_text("utf-8")
    assert caption.startswith("Attention of CLS, in layer ")
    assert "1 frame of a\\n\\x1b[31mb.mp4, " in caption
    other = (tmp_path / "out" / "film-1-2.txt").read_text("utf-8")
    assert other.startswith("Attention of patch (1, 2) (row, column), in layer ")


@pytest.mark.usefixtures("imported")
def test_a_head_that_the_model_has_not_is_said_once(clip, weights, tmp_path, caplog):
    arguments = ["heatmap", str(clip), str(clip), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--weights", str(weights), "--head", "99"]) == 2
    assert caplog.text.count("--head from 0 to") == 1


@pytest.mark.usefixtures("imported")
def test_a_broken_video_fails_alone_and_leaves_nothing(clip, weights, tmp_path, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:-2000])
    out = tmp_path / "out"
    images = [str(broken), str(clip)]
    assert main(["heatmap", *images, "-o", str(out), "--weights", str(weights)]) == 1
    assert os.listdir(out) == ["clip"]
    assert "broken.mp4" in caplog.text


@pytest.mark.parametrize(
    "options", [["--overview"], ["--animate", "gif"], ["--weights", "a", "--weights", "b"]]
)
def test_what_no_film_has_is_refused(clip, tmp_path, options, caplog):
    assert main(["heatmap", str(clip), "-o", str(tmp_path / "out"), *options]) == 2
    assert "of which a film is made" in caplog.text


def test_a_folder_without_images_is_no_film(tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    assert main(["heatmap", str(tmp_path / "empty"), "-o", str(tmp_path / "out")]) == 1
    assert "it is a folder" in caplog.text


def test_a_gif_is_an_image(tmp_path):
    frames = [Image.fromarray(bright(patch)) for patch in PATCHES[:2]]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    from dinov2_attn.apps.cli.filming import is_film

    assert not is_film(tmp_path / "a.gif")
