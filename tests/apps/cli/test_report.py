"""What commands print: the files, the one to open and the next command; more, less, nothing."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

import dinov2_attn
from dinov2_attn import viz
from dinov2_attn.apps.cli.log import held_back
from dinov2_attn.apps.cli.main import _parser, main
from dinov2_attn.errors import shown
from tests.apps.cli.test_model_options import load
from tests.support import subprocesses, upstreams
from tests.support.tolerances import assert_close

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("imported")

OUTPUTS = {"heatmap": "out", "explore": "page.html", "figure": "fig.pdf"}
FIRST = {"heatmap": "out/heads.png", "explore": "page.html", "figure": "fig.pdf"}
SIZE = ["--image-size", "28", "42"]


@pytest.fixture(autouse=True)
def here(tmp_path, image, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(image.read_bytes())
    return tmp_path


def run(command, *options):
    output = ["-o", OUTPUTS[command]]
    return main([command, "photo.png", *output, "--random-weights", *SIZE, *map(str, options)])


def written(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "photo.png"
    }


@pytest.mark.parametrize("command", OUTPUTS)
def test_every_file_is_named_and_the_one_to_open_comes_first(command, here, capsys):
    assert run(command, "-v") == 0
    said = capsys.readouterr().out
    block = said[said.index("wrote ") : said.index("next: ")]
    names = re.findall(r"^(?:wrote|     ) (\S+?)(?::.*)?$", block, re.M)
    assert set(names) == written(here)
    assert names[0] == FIRST[command]
    assert re.search(rf"^wrote {FIRST[command]}: .*  <- open this$", said, re.M)


@pytest.mark.parametrize("command", OUTPUTS)
def test_the_next_command_works_as_it_is_printed(command, here, weights, capsys):
    model = ["--weights", str(weights)]
    output = ["-o", OUTPUTS[command]]
    assert main([command, "photo.png", *output, *model, *SIZE]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "dinov2-attn"
    before = written(here)
    assert main(arguments) == 0
    assert written(here) > before
    assert f"{weights.name}" in capsys.readouterr().out  # the same model


def test_the_next_command_reads_images_alike_and_explains_the_same(here, weights, capsys):
    said = ["--target", "1,0", "--method", "legrad", "--range=-1,300", "--max-pixels", "99999"]
    values = ["--mean", "0.25,0.5,0.5", "--std", "0.5"]
    given = ["photo.png", "-o", "maps", "--weights", str(weights), *SIZE]
    assert main(["heatmap", *given, *said, *values]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    _, *arguments = shlex.split(line.removeprefix("next: "))
    typed = ["heatmap", *given, *said, *values]
    own, again = (vars(_parser().parse_args(one)) for one in (typed, arguments))
    for name in ("target", "method", "range", "max_pixels", "mean", "std"):
        assert own[name] == again[name] is not None
    assert main(arguments) == 0


def test_few_lines_name_the_many_files_of_heads(here, capsys):
    assert run("heatmap", "--threshold", 0.5) == 0
    said = capsys.readouterr().out
    assert "attn-head0.png … attn-head5.png" in said
    assert "mask_th0.5_head0.png … mask_th0.5_head5.png" in said
    assert len(said.splitlines()) < 8
    assert all(len(line) <= 100 for line in said.splitlines()[2:-1])
    assert said.startswith("photo.png: ViT-S/14, random weights; layer 11; cls; 2 × 3 patches\n")


@pytest.mark.parametrize("command", OUTPUTS)
def test_quiet_prints_nothing(command, capsys):
    assert run(command, "-q") == 0
    assert capsys.readouterr().out == ""


def test_quiet_still_has_warnings_and_verbose_says_where_code_comes_from(here):
    code = upstreams.CHECKOUT or upstreams.fetch_wheel(upstreams.FIRST.wheel)
    found = os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])

    def lines(*options):
        arguments = ["heatmap", "photo.png", "-o", "out", "--random-weights", *SIZE, *options]
        done = subprocesses.python("-m", "dinov2_attn", *arguments, cwd=here, PYTHONPATH=found)
        assert done.returncode == 0, done.stderr
        return done.stderr

    warning = "dinov2-attn: warning: RANDOM WEIGHTS: the maps of this run carry no meaning\n"
    assert lines("-q") == lines() == warning
    assert "dinov2-attn: debug: upstream's code is " in lines("-v")


def test_several_images_have_no_bar_outside_of_a_terminal(here, capsys):
    (here / "b.png").write_bytes((here / "photo.png").read_bytes())
    assert run("heatmap", "b.png", "nosuch.png") == 1
    said = capsys.readouterr()
    assert said.out.count("wrote ") == 2
    assert "image/s" not in said.err
    assert "\r" not in said.err


@pytest.mark.skipif(sys.platform != "linux", reason="another program opens files there")
@pytest.mark.parametrize("command", OUTPUTS)
def test_open_opens_the_first_file(command, here, monkeypatch, caplog):
    programs = here / "bin"
    programs.mkdir()
    opener = programs / "xdg-open"
    opener.write_text('#!/bin/sh\necho "$@" >> opened\n')
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    assert run(command, "--open") == 0
    assert (here / "opened").read_text() == f"{here / FIRST[command]}\n"
    opener.write_text("#!/bin/sh\nexit 3\n")
    assert run(command, "--open") == 0
    assert f"no program opens {FIRST[command]} here" in caplog.text


def say_and_fail(logger):
    with held_back(logger.name):
        logger.warning("again")
        raise KeyError


def test_a_log_that_is_held_back_comes_at_the_end_and_after_an_error(caplog):
    logger = logging.getLogger("dinov2_attn.held")
    with held_back(logger.name):
        logger.warning("where code came from")
        logging.getLogger("dinov2_attn.other").warning("what matters")
    assert caplog.messages == ["what matters", "where code came from"]
    with pytest.raises(KeyError):
        say_and_fail(logger)
    assert caplog.messages[-1] == "again"
    logger.warning("free")
    assert caplog.messages[-1] == "free"


# Models by name


@pytest.mark.parametrize(("name", "features"), [("dinov2_vits14", 384), ("dinov2_vitb14", 768)])
def test_a_name_of_the_hub_is_that_model(name, features, here):
    assert run("heatmap", "--model", name) == 0
    assert '"model": "ViT-' in (here / "out" / "run.json").read_text()
    model = load("--model", name, "--random-weights").model
    assert (model.embed_dim, model.patch_size) == (features, 14)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["--model", "dinov2_vits14", "--arch", "vit_base"], "--arch"),
        (["--model", "dinov2_vits14", "--patch-size", 14, "--registers"], "--registers"),
        (["--model", "dinov3_vits16", "--registers"], "--registers"),
        (["--model", "timm:vit_tiny_patch16_224", "--repo", "x"], "--repo"),
    ],
)
def test_a_name_says_all_of_the_model(options, given, caplog):
    assert run("heatmap", *options) == 2
    assert "alone, which says all of the model" in caplog.text
    assert given in caplog.text


def test_a_checkpoint_of_another_model_than_the_name(weights, caplog):
    arguments = ["photo.png", "-o", "out", "--weights", str(weights), *SIZE]
    assert main(["heatmap", *arguments, "--model", "dinov2_vits14"]) == 0
    for name in ("dinov2_vitb14", "dinov2_vits14_reg"):
        assert main(["heatmap", *arguments, "--model", name]) == 2
        assert f"Expected --model {name}, as given" in caplog.text


TINY = "timm:vit_tiny_patch16_224"


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_timm_is_drawn_like_any_other(here, capsys):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    torch.save(model.state_dict(), here / "tiny.pth")
    size = ["--image-size", "32", "48"]
    options = ["photo.png", "-o", "out", "--model", TINY, "--weights", "tiny.pth", *size]
    assert main(["heatmap", *options, "--layers", "3"]) == 0
    said = capsys.readouterr().out
    assert "vit_tiny_patch16_224 of timm, tiny.pth; layer blocks.3.attn; cls; 2 × 3" in said
    assert "next: dinov2-attn explore photo.png -o photo.html --weights=tiny.pth" in said
    assert main(["explore", "photo.png", "-o", "photo.html", *options[3:]]) == 0
    assert "vit_tiny_patch16_224 of timm" in capsys.readouterr().out

    # timm's weights of this model were trained with other values than ImageNet's.
    half = (0.5, 0.5, 0.5)
    assert model.pretrained_cfg["mean"] == half
    image = viz.load_image("photo.png", model, (32, 48), mean=half, std=half)
    with torch.inference_mode():
        maps = dinov2_attn.attention_maps(model, image.tensor[None], [3], queries="cls")
    theirs = maps.patch_maps()[0][0, :, 0].numpy()
    assert_close(np.load("out/attention.npy"), theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "timm:vit_tiny_patch16_225"], "Try vit_tiny_patch16_224"),
        (["--model", "timm:resnet18"], "one convolution inside timm.models.resnet.ResNet"),
        (["--model", TINY, "--weights", "wrong.pth"], "weights of timm's vit_tiny_patch16_224"),
    ],
)
def test_what_is_wrong_with_a_model_of_timm(options, said, here, caplog):
    pytest.importorskip("timm")
    torch.save({"a": torch.ones(1)}, here / "wrong.pth")
    random = [] if "--weights" in options else ["--random-weights"]
    arguments = ["photo.png", "-o", "out", "--image-size", "32", *options, *random]
    assert main(["heatmap", *arguments]) == 2
    text = " ".join(record.getMessage() for record in caplog.records)
    assert said in text
    assert not (here / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind there")
def test_a_bar_in_a_terminal_counts_failures(here):
    import fcntl
    import pty
    import struct
    import termios

    (here / "b.png").write_text("no pixels")
    code = upstreams.CHECKOUT or upstreams.fetch_wheel(upstreams.FIRST.wheel)
    found = os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])
    arguments = ["heatmap", "b.png", "photo.png", "-o", "out", "--random-weights", *SIZE]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    program = subprocess.Popen(
        [sys.executable, "-m", "dinov2_attn", *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": found},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    said = b"".join(iter(lambda: read(ours), b"")).decode()
    os.close(ours)
    assert program.wait() == 1
    assert "1 failed" in said
    assert "2/2" in said


def read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # on Linux, at the end
        return b""


def test_names_cannot_steer_the_terminal_or_fill_it():
    assert shown("a\x1b[31mb\r\n\u202ec") == "a\\x1b[31mb\\r\n\\u202ec"
    assert len(shown("key" * 10**6)) == 2001
    assert shown("Grüße, 3 × 4 … 5") == "Grüße, 3 × 4 … 5"


def test_an_error_shows_a_name_escaped(capfd):
    command = [sys.executable, "-m", "dinov2_attn", "heatmap", "no\x1b[31m.png", "-o", "out"]
    subprocess.run(command, check=False)
    said = capfd.readouterr().err
    assert "\x1b" not in said
    assert "no\\x1b[31m.png" in said
