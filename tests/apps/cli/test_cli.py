"""The program as a user meets it: files, exit status, messages, and no traceback."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2_attn
from dinov2_attn.apps.cli.main import _parser as parser
from dinov2_attn.apps.cli.main import main
from dinov2_attn.proof.conformance.synthetic_models import HEAD
from tests.support import upstreams
from tests.support.bright_patch import BRIGHT, GRID
from tests.support.subprocesses import OFFLINE, python
from tests.support.tolerances import assert_close, assert_same_bits

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("imported")


YELLOW = (253, 231, 36)  # the upper end of viridis


def heatmap(*arguments):
    return main(["heatmap", *map(str, arguments)])


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def test_the_planted_attention_arrives_in_the_pictures(image, weights, tmp_path):
    assert heatmap(image, "-o", tmp_path / "out", "--weights", weights, "--threshold", 0.3) == 0

    maps = np.load(tmp_path / "out" / "attention.npy")
    assert maps.shape == (6, *GRID)
    assert np.unravel_index(maps[HEAD].argmax(), GRID) == BRIGHT
    here = (pixels(image) == 255).all(axis=-1)
    for name in ("attn-mean.png", f"attn-head{HEAD}.png"):
        yellow = (pixels(tmp_path / "out" / name) == YELLOW).all(axis=-1)
        assert_same_bits(yellow, here)
    changed = pixels(tmp_path / "out" / f"mask_th0.3_head{HEAD}.png") != pixels(image)
    assert_same_bits(changed.any(axis=-1), ~here)


@pytest.mark.parametrize(("lengths", "shape"), [([42], (42, 70)), ([28, 56], (28, 56))])
def test_images_may_follow_the_image_size(image, tmp_path, lengths, shape):
    arguments = ["-o", tmp_path, "--random-weights", "--image-size", *lengths, image]
    assert heatmap(*arguments) == 0
    assert pixels(tmp_path / "img.png").shape[:2] == shape


@pytest.mark.parametrize("lengths", [(99999999999999999999999,), (14, 14000000)])
def test_an_image_size_beyond_reason_is_one_line(image, tmp_path, caplog, lengths):
    arguments = [image, "-o", tmp_path / "out", "--random-weights", "--image-size", *lengths]
    assert heatmap(*arguments) == 1
    assert "Give a smaller --image-size" in caplog.text
    assert not (tmp_path / "out").exists()


def test_an_output_may_be_named_through_what_is_not_there(image, tmp_path):
    assert heatmap(image, "-o", tmp_path / "nope" / ".." / "out", "--random-weights") == 0
    assert (tmp_path / "out" / "img.png").exists()


def test_an_interruption_is_no_traceback(image, tmp_path, monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov2_attn.apps.viz.heatmap.draw", interrupted)
    assert heatmap(image, "-o", tmp_path / "out", "--random-weights") == 130
    assert "interrupted" in caplog.text


def test_random_weights_say_so_and_repeat(image, tmp_path, caplog):
    for name in ("a", "b"):
        assert heatmap(image, "-o", tmp_path / name, "--random-weights") == 0
        torch.rand(1)
    assert "RANDOM WEIGHTS" in caplog.text
    assert len(pixels(tmp_path / "a" / "attn-mean.png")) > GRID[0] * 14
    maps = [np.load(tmp_path / name / "attention.npy") for name in ("a", "b")]
    assert_close(*maps)


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_what_was_installed_before_is_installed_after(image, weights, tmp_path, ends):
    given = [image if ends == "well" else tmp_path / "none.png", "--weights", weights]
    status = 0 if ends == "well" else 1
    assert heatmap(*given, "-o", tmp_path / "out") == status
    assert dinov2_attn.status().grafted == ()
    with dinov2_attn.install():
        before = dinov2_attn.status()
        assert heatmap(*given, "-o", tmp_path / "again") == status
        assert dinov2_attn.status() == before


def test_the_random_generator_of_the_process_is_left_alone(image, tmp_path):
    state = torch.get_rng_state()
    heatmap(image, "-o", tmp_path, "--random-weights")
    assert_same_bits(torch.get_rng_state(), state)


def test_an_unreadable_image_is_reported_and_the_others_go_on(image, weights, tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:60])
    (tmp_path / "Planted.PNG").write_bytes(image.read_bytes())
    (tmp_path / "empty").mkdir()
    images = [tmp_path / "broken.png", image, tmp_path / "empty", tmp_path / "Planted.PNG"]
    status = heatmap(*images, "-o", tmp_path / "out", "--weights", weights, "--image-size", 28, 42)
    assert status == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"planted", "Planted-2"}
    assert pixels(tmp_path / "out" / "Planted-2" / "img.png").shape == (28, 42, 3)
    assert f"Found {tmp_path / 'broken.png'}, which cannot be read" in caplog.text
    assert f"Found {tmp_path / 'empty'}, which cannot be read" in caplog.text


def test_an_output_that_cannot_be_written_is_reported(image, weights, tmp_path, caplog):
    (tmp_path / "out").touch()
    assert heatmap(image, "-o", tmp_path / "out", "--weights", weights) == 2
    assert f"Expected a folder that can be written at {tmp_path / 'out'}" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random-weights"], "Expected an image.\nFound none.\nName one, or use --example."),
        (["x.png", "--weights", "absent.pth"], "checkpoint at absent.pth.\nFound nothing.\nName"),
        (["x.png", "--device", "abacus"], "device that this torch can use.\nFound 'abacus'"),
        (["x.png", "--device", "meta"], "device that this torch can use.\nFound 'meta'"),
        (["x.png", "--patch-size", "600", "--random-weights"], "patch size from 1 to 518"),
        (["x.png", "--repo", "absent"], "Expected a checkout of upstream: a folder"),
        (
            ["x.png", "--patch-size", "16"],
            "Found patch size 16.\nGive your own weights",
        ),
        (["x.png", "--image-size", "1", "2", "3"], "two lengths in pixels.\nFound 1 2 3.\nGive N"),
        (["x.png", "--image-size", "0"], "one or two lengths in pixels.\nFound 0.\nGive N"),
        (["--image-size", "x.png"], "one or two lengths in pixels.\nFound x.png.\nGive N"),
        (["--image-size", "28.5", "x.png"], "lengths in pixels.\nFound 28.5 x.png.\nGive N"),
    ],
)
def test_a_user_error_is_three_lines_and_status_two(
    arguments, message, image, tmp_path, caplog, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(image.read_bytes())
    assert heatmap("-o", tmp_path / "out", *arguments) == 2
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


def test_registers_of_a_revision_without_them(image, tmp_path, caplog):
    if upstreams.FIRST.has_registers:
        pytest.skip("the checkout under test has registers")
    assert heatmap(image, "-o", tmp_path, "--random-weights", "--registers") == 2
    assert "Name a newer checkout with --repo PATH" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "1.5"], "expected a share in (0, 1]; found '1.5'. Try 0.6."),
        (["--threshold", "0"], "expected a share in (0, 1]; found '0'"),
        (["--threshold", "nan"], "expected a share in (0, 1]; found 'nan'"),
        (["--threshold", "much"], "expected a share in (0, 1]; found 'much'"),
        (["--patch-size", "-14"], "expected a whole number above 0; found '-14'"),
        (["--arch", "vit_tiny"], "invalid choice: 'vit_tiny'"),
        (["--weights", "x.pth", "--random-weights"], "not allowed with argument --weights"),
    ],
)
def test_a_bad_argument_is_explained(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        heatmap("x.png", "-o", tmp_path, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heatmap", "--query", "3,17"], "--query: did you mean --queries?"),
        (["heatmap", "--query=3,17"], "--query: did you mean --queries?"),
        (["demo", "--query", "cls"], "--query: did you mean --queries?"),
        (["extract", "--query", "cls"], "--query: did you mean --queries?"),
        (["extract", "--outliers"], "--outliers: did you mean --artifacts?"),
        (["heatmap", "--artifacts"], "--artifacts: did you mean --outliers?"),
        (["heatmap", "--sample"], "--sample: did you mean --example?"),
        (["explore", "--sample"], "--sample: did you mean --example?"),
        (["heatmap", "--layers"], "--overview draws layers by heads"),
        (["demo", "--layers", "--log"], "--overview draws layers by heads"),
        (["extract", "--layer", "x"], "expected blocks with commas"),  # argparse's abbreviation
        (["explore", "--layers"], "expected one argument\n"),
        (["heatmap", "--nothing-like-it"], "unrecognized arguments: --nothing-like-it.\n"),
        (["heatmap", "--queries", "cls", "x.png"], "found 'x.png'. "),
        (["heatmap", "--queries", "cls", "x.png"], "Put files before this option."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_of_another_name_is_suggested(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "-o", str(tmp_path / "out.html")])
    said = capsys.readouterr().err
    assert message in said
    assert f"dinov2-attn {arguments[0]}: error:" in said


def test_images_may_follow_the_queries_after_two_dashes(image, tmp_path):
    options = ["-o", tmp_path, "--random-weights", "--queries", "cls", "0,1"]
    assert heatmap(*options, "--", image) == 0
    assert (tmp_path / "heads-0-1.png").exists()


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: dinov2-attn")
    assert all(f"\n    {name} " in said for name in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main(["--bogus"])


COMMANDS = ("demo", "heatmap", "figure", "explore", "extract", "verify", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_sentences_and_ends_with_an_example(command):
    (subparsers,) = (a for a in parser()._actions if isinstance(a.choices, dict))
    own = subparsers.choices[command]
    options = [action.help for action in own._actions if action.dest != "help"]
    (summary,) = (a.help for a in subparsers._choices_actions if a.dest == command)
    for text in [summary, own.description, *options]:
        assert text, own.prog
        assert text[0].isupper()
        assert text.rstrip().endswith(".")
    example = own.epilog.strip().removeprefix("Example: dinov2-attn ")
    args, unknown = parser().parse_known_args(example.split())
    assert example.split()[0] == command
    assert not unknown
    assert args.parser.prog == own.prog


def test_pictures_need_an_extra(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert heatmap("--example", "-o", tmp_path, "--random-weights") == 2
    assert "Found no tqdm in this environment.\nInstall" in caplog.text
    assert "pip install 'dinov2-attn[viz]'" in caplog.text


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"dinov2-attn {dinov2_attn.__version__}\n"


# As its own process


def test_the_sample_runs_without_other_files(tmp_path):
    arguments = ["heatmap", "--example", "-o", "out", "--random-weights", "--image-size", "56"]
    result = python("-m", "dinov2_attn", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "wrote out/heads.png: every head on one scale  <- open this" in result.stdout
    assert "\nnext: dinov2-attn explore " in result.stdout
    lines = result.stderr.splitlines()
    assert (
        lines[-1] == "dinov2-attn: warning: RANDOM WEIGHTS: the maps of this run carry no meaning"
    )
    # Where upstream's code is not installed, there is a warning of its licence.
    assert all(line.startswith("dinov2-attn: warning: ") for line in lines)
    assert pixels(tmp_path / "out" / "img.png").shape == (56, 56, 3)


def test_without_weights_or_network_the_error_names_the_next_step(tmp_path):
    arguments = ["heatmap", "--example", "-o", "out"]
    result = python("-m", "dinov2_attn", *arguments, cwd=tmp_path, **OFFLINE, TORCH_HOME=tmp_path)
    assert result.returncode == 2
    *_, expected, found, hint = result.stderr.splitlines()
    assert expected.startswith("dinov2-attn: error: Expected upstream's dinov2 code")
    assert found.startswith("  Found no importable dinov2")
    assert "--repo PATH" in hint
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_does_not_wait_for_torch(tmp_path):
    code = """
import sys
from dinov2_attn.apps.cli.main import _parser as parser
from dinov2_attn.apps.cli.main import main
try:
    main(["heatmap", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--threshold" in result.stdout
