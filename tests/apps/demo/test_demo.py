"""The model that ships: that it finds the target, as only a map read rightly can."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import dinov2_attn
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.demo import game, load, train
from dinov2_attn.apps.demo.load import ARCHITECTURE, load_demo_model
from dinov2_attn.apps.demo.scenes import FIRST_TRAINING_SEED, PATCH, draw
from dinov2_attn.errors import UnavailableError, UnreadableFileError
from tests.support import upstreams
from tests.support.tolerances import are_close, assert_close, assert_same_bits, same_bits

CARD = (load.PATH.parent / "MODEL_CARD.md").read_text()
YELLOW = (253, 231, 36)  # the upper end of viridis

# Sums over the picture and over the mask of two small scenes.
DRAWN = [[2628526, 253], [2352725, 187]]

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture
def _imported(first):
    """Upstream can be imported, and grafts go with the test."""
    first.module(first.model)


@pytest.fixture
def _installed(_imported):
    dinov2_attn.install()


# Scenes


@given(seed=st.integers(0, 2**32 - 1), grid=grids)
def test_a_scene_is_as_large_as_its_grid(seed, grid):
    scene = draw(seed, grid)
    assert scene.grid == grid
    assert scene.picture.shape == (grid[0] * PATCH, grid[1] * PATCH, 3)
    assert scene.mask.any()


def test_a_target_covers_the_centre_of_one_patch_and_of_no_other(scenes):
    """So that a map which is read one patch aside misses it."""
    smallest = [draw(seed, (1, 1)) for seed in range(50)]
    for scene in (*scenes, *smallest):
        assert scene.mask[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].sum() == 1


@given(seed=st.integers(0, 2**32 - 1), grid=grids)
def test_a_scene_depends_on_its_seed_alone(seed, grid):
    scene = draw(seed, grid)
    np.random.seed(3)
    again = draw(seed, grid)
    assert_same_bits(scene.picture, again.picture)
    assert_same_bits(scene.mask, again.mask)
    assert not same_bits(draw((seed + 1) % 2**32, grid).picture, scene.picture)


def test_the_scenes_are_those_of_the_training_on_every_machine():
    """The file was trained on these and not on what a later version draws."""
    scenes = [draw(seed, (5, 8)) for seed in (0, FIRST_TRAINING_SEED)]
    drawn = [[int(scene.picture.sum()), int(scene.mask.sum())] for scene in scenes]
    # A sine in another rounding changes at most a few pixels by one.
    assert_close(drawn, DRAWN, within=5)


def test_half_of_the_held_out_scenes_are_square(scenes):
    assert len(scenes) == 200
    assert sum(h == w for h, w in (scene.grid for scene in scenes)) == 100
    assert sum(h < w for h, w in (scene.grid for scene in scenes)) > 30
    assert sum(h > w for h, w in (scene.grid for scene in scenes)) > 30


# The pointing game


@pytest.fixture(scope="module")
def scenes():
    return game.held_out()


@pytest.fixture(scope="module")
def expected(scenes):
    """The rows of the shipped model for all of them, in upstream itself."""
    upstream = upstreams.FIRST
    with dinov2_attn.install(upstream.package):
        return game.cls_rows(load_demo_model(upstream.module(upstream.model)), scenes)


@pytest.fixture(scope="module")
def played(expected, scenes):
    """Rows and scenes, by whether these are square."""

    def half(square):
        pairs = zip(expected, scenes, strict=True)
        return zip(*[(r, s) for r, s in pairs if (s.grid[0] == s.grid[1]) == square], strict=True)

    return {square: tuple(half(square)) for square in (True, False)}


@pytest.mark.parametrize("square", [True, False])
def test_the_maximum_of_the_map_is_on_the_target(played, square):
    assert np.mean(game.hits(*played[square])) >= 0.9


# Two standard deviations of what a blind pointer finds in a hundred throws at 2 %.
LUCK = 0.028


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize(
    "reading", ["one token late", "one token early", "one row of patches too low"]
)
def test_one_patch_aside_it_is_no_better_than_chance(played, reading, square):
    rows, scenes = played[square]
    assert np.mean(game.hits(rows, scenes, reading)) <= game.chance(scenes) + LUCK


@pytest.mark.parametrize(
    ("square", "reading"),
    [(True, game.TRANSPOSED), (False, game.TRANSPOSED), (False, game.SWAPPED)],
)
def test_transposed_it_is_no_better_than_chance(played, square, reading):
    rows, scenes = played[square]
    assert np.mean(game.hits(rows, scenes, reading)) <= game.chance(scenes) + LUCK


def test_a_blind_pointer_has_the_score_of_chance(played):
    for _, scenes in played.values():
        throws = np.random.default_rng(0).random((50, len(scenes), 2))
        found = [
            scene.mask[tuple((throw * scene.mask.shape).astype(int))]
            for row in throws
            for throw, scene in zip(row, scenes, strict=True)
        ]
        assert abs(np.mean(found) - game.chance(scenes)) < 0.005
        assert game.chance(scenes) < 0.03


@pytest.mark.parametrize("height", [28, 70])
@pytest.mark.parametrize("cell", [(0, 0), (0, 2), (1, 1), (1, 2)])
def test_the_peak_is_inside_of_the_greatest_patch(cell, height):
    values = torch.rand(2, 3) / 2
    values[cell] = 1.0
    y, x = game.peak(values, (height, 42))
    assert (y * 2 // height, x // 14) == cell


def test_a_reading_takes_cls_for_no_patch():
    row = torch.arange(7.0)
    assert game.READINGS[game.RIGHTLY](row[1:], (2, 3)).tolist() == [[1, 2, 3], [4, 5, 6]]
    transposed = game.READINGS[game.TRANSPOSED](row[1:], (2, 3))
    assert transposed.tolist() == [[1, 3, 5], [2, 4, 6]]


# The file


def test_the_card_describes_this_file():
    assert f"`{hashlib.sha256(load.PATH.read_bytes()).hexdigest()}`" in CARD
    assert load.PATH.stat().st_size <= 1_500_000


@pytest.mark.usefixtures("_installed")
def test_the_cards_figures_are_what_is_measured(scenes):
    """Up to two scenes in a hundred, which another machine's rounding may turn."""
    measured = game.table(load_demo_model(), scenes)
    assert [line.split("|")[1] for line in quoted()] == [line.split("|")[1] for line in measured]
    assert_close(shares(quoted()), shares(measured), within=2.0)


def quoted():
    pointing_game = CARD.partition("## How faithful")[0]
    return [line for line in pointing_game.splitlines() if line.startswith("|")]


def shares(lines):
    return [[float(share) for share in re.findall(r"([\d.]+)%", line)] for line in lines[2:]]


def test_the_file_states_how_to_build_the_model():
    with safe_open(load.PATH, "pt") as file:
        assert file.metadata() == {key: str(value) for key, value in ARCHITECTURE.items()}
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.float16}


def test_every_copy_of_the_code_gives_the_same_maps(expected, models, scenes):
    model = load_demo_model(models.module(models.model))
    assert not model.pos_embed.any()
    for row, theirs in zip(game.cls_rows(model, scenes[:40]), expected[:40], strict=True):
        assert_close(row, theirs)


@pytest.mark.usefixtures("_imported")
def test_a_file_that_is_not_the_shipped_one_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "PATH", tmp_path / "model.safetensors")
    for content in (None, load.PATH.name.encode()):
        if content:
            load.PATH.write_bytes(content)
        with pytest.raises(UnreadableFileError, match=r"(?s)of this package\..*Reinstall"):
            load_demo_model()


@pytest.mark.usefixtures("_imported")
def test_without_safetensors_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UnavailableError, match=r"(?s)library safetensors.*dinov2-attn\[viz\]"):
        load_demo_model()


# Training


@pytest.mark.usefixtures("_installed")
def test_training_is_reproducible_and_moves_the_attention_of_cls(monkeypatch):
    monkeypatch.setattr(train, "BATCH", 8)
    state = torch.get_rng_state()
    one, other = train.train(0, 2), train.train(1, 2)
    assert_same_bits(torch.get_rng_state(), state)
    torch.rand(1)
    two, before = train.train(0, 2), train.start(0)
    for name, value in one.state_dict().items():
        assert_same_bits(value, two.state_dict()[name], name)
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.3.attn.qkv.weight"):
        assert not are_close(one.state_dict()[name], before.state_dict()[name]), name
        assert not are_close(one.state_dict()[name], other.state_dict()[name]), name
    assert not one.pos_embed.any()


@pytest.mark.usefixtures("_imported")
def test_what_training_writes_is_what_loading_reads(tmp_path):
    model = train.start(0)
    train.save(model, tmp_path / "model.safetensors")
    read = load.fill(load.build(), tmp_path / "model.safetensors")
    assert not read.training
    for name, value in read.state_dict().items():
        assert_same_bits(value, model.state_dict()[name].half().float(), name)


@pytest.mark.usefixtures("_imported")
def test_the_script_writes_the_file_and_prints_what_the_card_quotes(tmp_path, monkeypatch, capsys):
    file = tmp_path / "model.safetensors"
    monkeypatch.setattr(train, "STEPS", 1)
    monkeypatch.setattr(train, "held_out", lambda: game.held_out(8))
    monkeypatch.setattr(sys, "argv", ["train", "-o", str(file)])
    train.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert [line.split("|")[1] for line in quoted()] == [
        line.split("|")[1] for line in printed if line.startswith("|")
    ]


@pytest.mark.usefixtures("_installed")
def test_the_loss_is_smallest_if_cls_attends_to_the_target():
    scenes = [draw(seed, (5, 7)) for seed in range(4)]
    shipped, untrained = load_demo_model(), train.start(0)
    with torch.no_grad():
        assert train.loss_of(shipped, scenes) < train.loss_of(untrained, scenes) - 1


# The command


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.usefixtures("_imported")
def test_the_command_draws_scenes_and_attention(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path), "--count", "4", "--seed", "7"]) == 0
    shapes = {"scene-7-square": 1, "scene-8-wide": 2, "scene-9-tall": 0.5, "scene-10-square": 1}
    assert {path.name for path in tmp_path.iterdir()} == set(shapes)
    for name, ratio in shapes.items():
        captioned = {"heads.png", "overlay.png"}
        files = {path.name: path for path in (tmp_path / name).glob("*.png")}
        assert captioned < set(files)
        pictures = [pixels(files[name]) for name in set(files) - captioned]
        assert len(pictures) == 3 + ARCHITECTURE["num_heads"]
        ((height, width, _),) = {picture.shape for picture in pictures}  # no warning below any
        assert width / height == ratio
    shown = pixels(tmp_path / "scene-8-wide" / "img.png")
    assert_same_bits(shown, draw(8, (7, 14)).picture)
    printed = capsys.readouterr().out
    assert printed.count("the map's maximum is on the target") == 4
    assert "pointing game: 4 of 4\nwrote " in printed
    first = tmp_path / "scene-7-square"
    assert f"wrote {first / 'heads.png'}: the target is outlined" in printed
    assert f"page: {first / 'page.html'}: " in printed
    assert "\nThe model is a small" in printed
    known = inspect.signature(type(load_demo_model())).parameters
    named = "dinov2_vits14_reg" if "num_register_tokens" in known else "dinov2_vits14"
    assert f"next: dinov2-attn heatmap YOUR_IMAGE.jpg -o maps --model {named}\n" in printed
    assert (first / "page.html").read_text().count("scene 7 (square)") > 0


@pytest.mark.usefixtures("_imported")
def test_the_target_is_outlined(tmp_path):
    assert main(["demo", "-o", str(tmp_path), "--count", "1", "--format", "svg"]) == 0
    for name in ("heads.svg", "overlay.svg"):
        drawn = (tmp_path / "scene-0-square" / name).read_text()
        assert "The thin white line is around" in drawn
        assert drawn.count("LineCollection") > 0


@pytest.mark.usefixtures("_imported")
def test_the_brightest_patch_of_the_picture_is_the_targets(tmp_path):
    assert main(["demo", "-o", str(tmp_path), "--count", "2"]) == 0
    mean = pixels(tmp_path / "scene-1-wide" / "attn-mean.png")
    brightest = (mean == YELLOW).all(axis=-1)
    mask = draw(1, (7, 14)).mask
    assert brightest.sum() == PATCH * PATCH
    assert (brightest & mask).sum() > 0.5 * mask.sum()


@pytest.mark.usefixtures("_imported")
def test_the_text_of_a_miss(tmp_path, capsys, monkeypatch):
    file = tmp_path / "untrained.safetensors"
    save_file(train.start(0).state_dict(), file, {"num_heads": "2"})
    monkeypatch.setattr("dinov2_attn.apps.cli.demo.PATH", file)
    assert main(["demo", "-o", str(tmp_path / "out"), "--count", "3"]) == 0
    assert re.search(r"not on the target.*pointing game: [0-2] of 3", capsys.readouterr().out, re.S)


def test_scenes_of_the_training_are_not_shown(tmp_path, caplog):
    assert main(["demo", "-o", str(tmp_path), "--seed", str(FIRST_TRAINING_SEED - 2)]) == 2
    assert "Expected scenes of seeds below 1,000,000,000" in caplog.text


@pytest.mark.usefixtures("_imported")
def test_the_command_names_missing_libraries(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["demo", "-o", str(tmp_path / "out")]) == 2
    assert "Install it with `pip install 'dinov2-attn[viz]'`" in caplog.text
    assert not (tmp_path / "out").exists()
