"""The model that a command line chooses: a checkpoint says what it is, and needs nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.cli.model_options import add_options, load_model
from dinov2_attn.apps.weights.models import build_like
from dinov2_attn.errors import InvalidInputError, UnavailableError
from dinov2_attn.proof.conformance.synthetic_models import look_at_what_is_bright
from tests.apps.weights.test_architecture import SMALL
from tests.support import checkpoint_files, upstreams
from tests.support.bright_patch import photograph_of
from tests.support.strategies import randomise
from tests.support.subprocesses import OFFLINE, python
from tests.support.tolerances import assert_same_bits

GRID, BRIGHT = (3, 5), (1, 3)
TWO_HEADS = replace(SMALL, embed_dim=128, num_heads=2, patch_size=7, img_size=21, ffn="swiglufused")


@pytest.fixture(autouse=True)
def _first(first):
    upstreams.FIRST.module("dinov2.models.vision_transformer")


def load(*options):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return load_model(parser.parse_args([*map(str, options)]))


@pytest.fixture(scope="module")
def model():
    upstreams.FIRST.module("dinov2.models.vision_transformer")
    return look_at_what_is_bright(randomise(build_like(TWO_HEADS), 0))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "teacher_checkpoint.pth"
    torch.save({"teacher": checkpoint_files.training(model).state_dict(), "epoch": 3}, path)
    return path


def saved_small(path, **changes):
    torch.save(randomise(build_like(replace(SMALL, **changes)), 0).state_dict(), path)
    return path


def test_a_checkpoint_needs_nothing_else(model, file, caplog):
    caplog.set_level("INFO", "dinov2_attn")
    loaded = load("--weights", file)
    state = loaded.model.state_dict()
    assert_same_bits({name: state[name] for name in model.state_dict()}, model.state_dict())
    assert loaded.model.num_heads == 2
    assert loaded.name == "ViT-128x2/7, teacher_checkpoint.pth, heads assumed: 2"
    assert not loaded.random
    assert "left out" in caplog.text
    assert "teacher.dino_head" in caplog.text


def test_names_for_captions(tmp_path):
    assert load("--random-weights").name == "ViT-S/14, random weights"
    assert load("--random-weights", "--patch-size", 16).name == "ViT-S/16, random weights"
    path = saved_small(tmp_path / "mine.pth", embed_dim=384, depth=12, patch_size=4, img_size=4)
    assert load("--weights", path).name == "ViT-S/4, mine.pth, heads assumed: 6"


def test_options_that_agree_are_welcome(file, tmp_path):
    assert load("--weights", file, "--patch-size", 7, "--num-heads", 2).model.patch_size == 7
    path = saved_small(tmp_path / "mine.pth", embed_dim=384, depth=12, patch_size=4, img_size=4)
    assert load("--weights", path, "--arch", "vit_small").model.num_heads == 6


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--arch", "vit_small"], "--arch vit_small"),
        (["--patch-size", "14"], "--patch-size 14"),
        (["--registers"], "--registers, which are 4"),
        (["--registers", "--arch", "vit_base"], "--arch vit_base, --registers, which are 4"),
    ],
)
def test_options_that_contradict_are_an_error_with_both_sides(file, options, asked):
    message = rf"Expected {asked}, as given\.\nFound {file}, which holds ViT-128x2/7\.\nLeave"
    with pytest.raises(InvalidInputError, match=message):
        load("--weights", file, *options)


def test_the_error_for_unknown_heads_names_the_option(tmp_path):
    path = saved_small(tmp_path / "mine.pth", embed_dim=96)
    with pytest.raises(InvalidInputError, match=r"(?s)Found .* with 96 features.*--num-heads N"):
        load("--weights", path)
    assert load("--weights", path, "--num-heads", 3).model.num_heads == 3
    for others in (["--random-weights"], []):
        with pytest.raises(InvalidInputError, match="--num-heads together with --weights PATH"):
            load("--num-heads", 3, *others)


def test_a_safetensors_file_can_state_its_heads(tmp_path):
    save_file = pytest.importorskip(
        "safetensors.torch", reason="not here: test_architecture has the same as an object"
    ).save_file
    state = randomise(build_like(replace(SMALL, embed_dim=96)), 0).state_dict()
    save_file(state, tmp_path / "mine.safetensors", {"num_heads": "3", "note": "mine"})
    assert load("--weights", tmp_path / "mine.safetensors").model.num_heads == 3


def test_a_checkpoint_with_registers(tmp_path, caplog):
    caplog.set_level("DEBUG", logger="dinov2_attn")
    state = dict(randomise(build_like(SMALL), 0).state_dict())
    state["register_tokens"] = torch.ones(1, 4, SMALL.embed_dim)
    torch.save(state, tmp_path / "mine.pth")
    if upstreams.FIRST.has_registers:
        loaded = load("--weights", tmp_path / "mine.pth", "--registers")
        assert loaded.name == "ViT-64x2/2, 4 registers, mine.pth, heads assumed: 1"
        assert loaded.model.interpolate_antialias is True
    else:
        with pytest.raises(
            UnavailableError, match=r"(?s)with registers.*Found one without.*--repo PATH"
        ):
            load("--weights", tmp_path / "mine.pth")
    assert "positions are interpolated as in the published models with registers" in caplog.text


def test_a_file_is_read_before_upstreams_code_is_searched(file, tmp_path):
    """What is wrong with it is said at once, and without a network."""
    file.with_name("broken.pth").write_bytes(file.read_bytes()[:900])
    code = f"""
from dinov2_attn.apps.cli.main import main
main(["heatmap", "--example", "-o", "out", "--weights", {str(file.with_name("broken.pth"))!r}])
"""
    result = python("-c", code, cwd=tmp_path, **OFFLINE, TORCH_HOME=tmp_path)
    assert "a file by torch.save that was cut short" in result.stderr
    assert "upstream's" not in result.stderr


def test_a_fresh_process_draws_what_a_training_checkpoint_sees(file, tmp_path):
    """Nothing but the checkpoint and the photograph is named."""
    Image.fromarray(photograph_of(GRID, BRIGHT, patch_size=7)).save(tmp_path / "photo.png")
    arguments = ["heatmap", "--weights", file, "photo.png", "-o", "out"]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)} if upstreams.CHECKOUT else {}
    result = python("-m", "dinov2_attn", *arguments, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    maps = np.load(tmp_path / "out" / "attention.npy")
    assert maps.shape == (2, *GRID)
    assert np.unravel_index(maps[1].argmax(), GRID) == BRIGHT
    assert "photo.png: ViT-128x2/7, teacher_checkpoint.pth" in result.stdout


def test_a_limit_on_pixels_is_one_line(file, tmp_path, caplog):
    Image.fromarray(photograph_of(GRID, BRIGHT, patch_size=7)).save(tmp_path / "photo.png")
    arguments = ["heatmap", tmp_path / "photo.png", "-o", tmp_path / "out", "--weights", file]
    arguments = [*map(str, arguments)]
    assert main([*arguments, "--max-pixels", "734"]) == 1
    assert "Expected an image of at most 734 pixels.\nFound" in caplog.text
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--max-pixels", "735"]) == 0
