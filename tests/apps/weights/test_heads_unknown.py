"""The number of heads is not in weights: it is said, known of a published shape, or doubted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import dinov2_attn
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.weights.architecture import candidates, doubt, heads_of, infer
from dinov2_attn.apps.weights.models import build_like
from dinov2_attn.apps.weights.reading import Checkpoint, read
from dinov2_attn.errors import InvalidInputError
from tests.apps.weights.test_architecture import SMALL
from tests.support import upstreams
from tests.support.bright_patch import photograph_of
from tests.support.pages import Page
from tests.support.strategies import randomise

WIDE = replace(SMALL, embed_dim=320, num_heads=4, patch_size=7, img_size=21)

PUBLISHED = {
    "vit_tiny": (192, 12, "mlp", 768, 3),
    "vit_small": (384, 12, "mlp", 1536, 6),
    "vit_base": (768, 12, "mlp", 3072, 12),
    "vit_large": (1024, 24, "mlp", 4096, 16),
    "vit_giant2": (1536, 40, "swiglufused", 4096, 24),
}


@pytest.fixture(autouse=True)
def _first(first):
    upstreams.FIRST.module("dinov2.models.vision_transformer")


def of_shape(embed_dim, depth, ffn, hidden):
    shape = replace(SMALL, embed_dim=embed_dim, depth=depth, ffn=ffn, hidden=hidden)
    return heads_of(Checkpoint("x.pth", {}), shape)


@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED)
def test_published_shapes_raise_no_doubt(shape):
    *dimensions, heads = shape
    found = of_shape(*dimensions)
    assert (found.num_heads, found.heads_assumed, doubt(found)) == (heads, False, None)


@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((384, 12, "mlp", 1530), 6),
        ((384, 11, "mlp", 1536), 6),
        ((1024, 24, "swiglufused", 4096), 16),
        ((320, 3, "mlp", 1280), 5),
        ((1280, 32, "mlp", 5120), 16),
    ],
)
def test_other_shapes_raise_doubt(shape, heads):
    found = of_shape(*shape)
    assert (found.num_heads, found.heads_assumed) == (heads, True)
    assert doubt(found).startswith(f"heads assumed: {heads}. ")
    assert f"{heads} (" in candidates(shape[0])


def test_candidates_divide_the_features():
    assert candidates(320) == "4 (80 features each), 5 (64), 8 (40), 10 (32)"
    assert candidates(96) == "1 (96 features each), 2 (48), 3 (32)"
    assert candidates(128) == "1 (128 features each), 2 (64), 4 (32)"
    assert candidates(7) == "1 (7 features each), 7 (1)"
    # 225 has nine divisors, and none of 32 to 128 is a multiple of 8: eight are named.
    assert candidates(225).endswith("25 (9), 45 (5), 75 (3)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heads")


@pytest.fixture
def file(folder):
    path = folder / "t.pth"
    torch.save({"teacher": randomise(build_like(WIDE), 0).state_dict()}, path)
    photograph = Image.fromarray(photograph_of((3, 3), (1, 1), patch_size=7))
    photograph.save(folder / "photo.png")
    return path


def height_of(picture):
    with Image.open(picture) as opened:
        return opened.height


def test_every_result_states_that_heads_are_assumed(file, folder, caplog):
    out = str(folder / "out")
    assert main(["heatmap", str(folder / "photo.png"), "-o", out, "--weights", str(file)]) == 0
    assert "heads assumed: 5. " in caplog.text
    assert "--num-heads N: 4 (80 features each), 5 (64), 8 (40), 10 (32)" in caplog.text
    known = str(folder / "known")
    options = ["--weights", str(file), "--num-heads", "4"]
    caplog.clear()
    assert main(["heatmap", str(folder / "photo.png"), "-o", known, *options]) == 0
    assert "heads assumed" not in caplog.text
    assert height_of(f"{out}/attn-head0.png") > height_of(f"{known}/attn-head0.png")  # a banner
    page = str(folder / "page.html")
    assert main(["explore", str(folder / "photo.png"), "-o", page, "--weights", str(file)]) == 0
    assert Page(folder / "page.html").one("p", id="warning")["text"].startswith("heads assumed: 5")
    maps = folder / "maps"
    assert main(["extract", str(folder / "photo.png"), "-o", str(maps), *options[:2]]) == 0
    about = json.loads((maps / "extraction.json").read_text())["model"]
    assert about["warning"].startswith("heads assumed: 5")
    assert about["name"].endswith("heads assumed: 5")


def test_heads_come_from_upstreams_config(folder):
    """Two folders below it, as upstream's training writes teacher checkpoints."""
    run = folder / "run" / "eval" / "training_9"
    run.mkdir(parents=True)
    shape = replace(SMALL, embed_dim=384, depth=12, num_heads=6, hidden=8, img_size=4)
    torch.save(build_like(shape).state_dict(), run / "teacher_checkpoint.pth")
    assert infer(read(run / "teacher_checkpoint.pth")).heads_assumed
    config = folder / "run" / "config.yaml"
    config.write_text(
        "train:\n  arch: vit_large\nstudent:\n  arch: vit_small\n  patch_size: 14\n"
        "  interpolate_antialias: true\n  interpolate_offset: 0.0\nteacher:\n  x: 1\n"
    )
    found = infer(read(run / "teacher_checkpoint.pth"))
    assert (found.num_heads, found.heads_assumed) == (6, False)
    assert found.interpolation == (True, 0.0)
    config.write_text("student:\n  arch: vit_base\n")  # another model's
    assert infer(read(run / "teacher_checkpoint.pth")).heads_assumed
    config.write_text("a word")
    assert infer(read(run / "teacher_checkpoint.pth")).heads_assumed


def test_if_64_does_not_divide_the_error_lists_candidates(folder):
    torch.save(build_like(replace(WIDE, embed_dim=96, num_heads=1)).state_dict(), folder / "x.pth")
    message = r"--num-heads N: 1 \(96 features each\), 2 \(48\), 3 \(32\)"
    with pytest.raises(InvalidInputError, match=message):
        infer(read(folder / "x.pth"))
    assert infer(read(folder / "x.pth"), 3).num_heads == 3


def test_a_key_needs_a_checkpoint(caplog):
    assert main(["heatmap", "x.png", "-o", "out", "--key", "student", "--random-weights"]) == 2
    assert "--key together with --weights PATH" in caplog.text


def test_the_command_line_takes_a_key(file, folder, caplog):
    both = {name: randomise(build_like(WIDE), i).state_dict() for i, name in enumerate("ab")}
    torch.save(both, folder / "both.pth")
    arguments = ["heatmap", str(folder / "photo.png"), "-o", str(folder / "of_b")]
    arguments += ["--weights", str(folder / "both.pth"), "--num-heads", "4"]
    assert main(arguments) == 2
    assert "Choose one: --key b" in caplog.text
    caplog.set_level("INFO", "dinov2_attn")
    assert main([*arguments, "--key", "b"]) == 0
    assert "loaded b, left out a" in caplog.text
    assert main([*arguments, "--key", "c"]) == 2
    assert "named 'c'.\nFound models at a, b." in caplog.text
    assert dinov2_attn.load_checkpoint(build_like(WIDE), folder / "both.pth", key="a") == ("b",)
