"""``heatmap --target``: relevance from the command line, for classes and tokens."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov2_attn import relevance, viz
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.cli.model_options import add_options, load_model
from dinov2_attn.apps.cli.relevance_options import METHODS
from dinov2_attn.apps.viz.images import load_image
from dinov2_attn.apps.weights.classifiers import LinearClassifier, of_hub
from dinov2_attn.apps.weights.models import build_like
from dinov2_attn.errors import UnreadableFileError
from dinov2_attn.maps.relevance import Method
from dinov2_attn.maps.targets import token_similarity
from tests.apps.weights.test_architecture import SMALL
from tests.support import upstreams
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights
pytestmark = pytest.mark.usefixtures("imported")

CLASSES = 7
SHAPE = replace(SMALL, embed_dim=128, num_heads=2, depth=4, patch_size=14, img_size=28)


def heatmap(*arguments):
    return main(["heatmap", *map(str, arguments)])


def classifier_of(layers, seed=0):
    """Return a small DINOv2 with a linear classifier of random weights."""
    backbone = randomise(build_like(SHAPE), seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        linear = nn.Linear((1 + layers) * SHAPE.embed_dim, CLASSES)
    return LinearClassifier(backbone, linear).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints as upstream's classifier has its names, with one layer and with four."""
    upstreams.FIRST.module("dinov2.models.vision_transformer")
    folder, found = tmp_path_factory.mktemp("classifiers"), {}
    for layers in (1, 4):
        model = classifier_of(layers)
        state = {
            name.replace("linear.", "linear_head."): tensor
            for name, tensor in model.state_dict().items()
        }
        found[layers] = folder / f"layers{layers}.pth"
        torch.save(state, found[layers])
    return found


@pytest.mark.parametrize(
    ("layers", "method"), [(4, "chefer"), *((1, method) for method in METHODS)]
)
def test_a_class_is_explained_as_in_python(files, image, tmp_path, layers, method):
    arguments = (image, "-o", tmp_path, "--weights", files[layers], "--target", 3)
    assert heatmap(*arguments, "--method", method) == 0
    model = classifier_of(layers)
    given = load_image(image, model.backbone)
    expected = relevance(model, given.tensor[None], 3, method).patch_maps()[0, 0]
    assert_close(torch.from_numpy(np.load(tmp_path / "relevance.npy")), expected.float())
    assert expected.abs().max() > 0
    words = Image.open(tmp_path / "relevance.png").text
    facts = json.loads(words["Description"])
    assert (facts["target"], facts["method"]) == ("class 3", method)
    assert words["Title"].startswith("Relevance")
    options = json.loads((tmp_path / "run.json").read_text())["options"]
    assert (options["target"], options["method"]) == ("3", method)


@pytest.mark.parametrize("token", ["2,3", "#8"])
def test_the_similarity_of_a_token_needs_no_classifier(files, image, tmp_path, token):
    assert heatmap(image, "-o", tmp_path, "--weights", files[1], "--target", token) == 0
    model = classifier_of(1).backbone
    given = load_image(image, model)
    columns = given.tensor.shape[-1] // 14
    position = 1 + 2 * columns + 3 if token == "2,3" else 8
    found = relevance(model, given.tensor[None], token_similarity(position))
    expected = found.patch_maps()[0, 0]
    assert_close(torch.from_numpy(np.load(tmp_path / "relevance.npy")), expected.float())
    assert found.target[0].startswith("the similarity of patch (")


def test_rows_of_other_tokens_have_files_of_their_own(files, image, tmp_path, capsys):
    arguments = (image, "-o", tmp_path, "--weights", files[1], "--target", 3)
    assert heatmap(*arguments, "--queries", "cls", "1,2") == 0
    assert {path.name for path in tmp_path.glob("relevance*")} == {
        "relevance.png", "relevance.npy", "relevance-1-2.png", "relevance-1-2.npy",
    }  # fmt: skip
    assert "relevance.png: which patches made the target  <- open this" in capsys.readouterr().out
    assert heatmap(*arguments, "--queries", "1,2", "--method", "legrad") == 0
    assert {path.name for path in tmp_path.glob("relevance*")} == {"relevance.png", "relevance.npy"}
    assert heatmap(image, "-o", tmp_path, "--weights", files[1]) == 0
    assert not list(tmp_path.glob("relevance*"))


def test_random_weights_keep_their_warning(image, tmp_path):
    arguments = (image, "-o", tmp_path, "--random-weights", "--model", "dinov2_vits14_lc")
    assert heatmap(*arguments, "--target", 999, "--image-size", 28) == 0
    words = Image.open(tmp_path / "relevance.png").text
    assert "RANDOM" in json.loads(words["Description"])["warning"].upper()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "7"], "a class from 0 to 6"),
        (["--target", "register:1"], "register"),
        (["--target", "99,0"], "99"),
        (["--method", "chefer"], "--method together with --target"),
    ],
)
def test_what_is_not_there_is_an_error(files, image, tmp_path, capsys, caplog, arguments, said):
    assert heatmap(image, "-o", tmp_path / "out", "--weights", files[1], *arguments) in (1, 2)
    assert said in capsys.readouterr().err + caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--target", "cls"], ["--target", "cat"], ["--target", "-1"], ["--method", "gradcam"]],
)
def test_what_cannot_be_read_is_refused_by_the_option(image, tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        heatmap(image, "-o", tmp_path, "--random-weights", *arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_class_needs_a_classifier(image, tmp_path, capsys, caplog):
    arguments = (image, "-o", tmp_path / "out", "--random-weights", "--target", 3)
    assert heatmap(*arguments, "--image-size", 28) == 2
    assert "a model with a classifier" in capsys.readouterr().err + caplog.text


def test_methods_are_those_of_the_function():
    assert set(get_args(Method)) == set(METHODS)


def shown_on(page):
    """Return the relevance that a page is given."""
    data = re.search(rb'id="about">(.*?)</script>', page.read_bytes())
    return json.loads(data[1])["relevance"]


def test_the_page_is_given_the_same(files, image, tmp_path):
    page = tmp_path / "page.html"
    run = ["explore", str(image), "-o", str(page), "--weights", str(files[1]), "--layers", "1"]
    assert main([*run, "--target", "3", "--method", "attention_gradient"]) == 0
    model = classifier_of(1)
    given = load_image(image, model.backbone)
    expected = relevance(model, given.tensor[None], 3, "attention_gradient")
    shown = shown_on(page)
    assert_close(torch.tensor(shown["values"]), expected.weights[0, 0], within=1e-5)
    assert (shown["target"], shown["layers"]) == ("class 3", "last layer")
    options = json.loads((tmp_path / "page.html.run.json").read_text())["options"]
    assert (options["target"], options["method"]) == ("3", "attention_gradient")
    assert main([*run, "--target", "7"]) == 2
    assert main([*run, "--method", "legrad"]) == 2


def test_a_page_of_a_model_asks_it_for_the_target(files, image, tmp_path):
    backbone = classifier_of(1).backbone
    given = load_image(image, backbone)
    target = token_similarity(3)
    viz.explore(backbone, given, tmp_path / "page.html", target=target, method="legrad")
    expected = relevance(backbone, given.tensor[None], target, "legrad")
    shown = shown_on(tmp_path / "page.html")
    assert_close(torch.tensor(shown["values"]), expected.weights[0, 0], within=1e-5)
    assert shown["target"] == "the similarity of patch (0, 2) and CLS"
    assert (shown["method"], shown["row"]) == ("legrad", "mean of the rows of all tokens")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder of checkpoints, in which nothing is yet."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("registers", [False, True])
def test_a_published_head_is_read_under_its_name(hub, registers):
    expected = nn.Linear(5 * SHAPE.embed_dim, 1000).requires_grad_(False)
    name = "dinov2_vits14_reg4" if registers else "dinov2_vits14"
    torch.save(expected.state_dict(), hub / f"{name}_linear4_head.pth")
    backbone = build_like(SHAPE)
    found = of_hub(backbone, "dinov2_vits14", registers=registers, random=False)
    assert_same_bits(found.linear.state_dict(), expected.state_dict())
    (hub / f"{name}_linear4_head.pth").unlink()
    torch.save({"weight": torch.zeros(3, 3)}, hub / f"{name}_linear4_head.pth")
    with pytest.raises(UnreadableFileError, match="640 to 1000"):
        of_hub(backbone, "dinov2_vits14", registers=registers, random=False)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_a_classifier_of_transformers_gives_its_logits(tmp_path, kind, with_registers):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28,
        num_labels=CLASSES, mlp_ratio=2,
    )  # fmt: skip
    theirs = randomise(getattr(transformers, f"{kind}ForImageClassification")(config).eval(), 0)
    theirs.save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    add_options(parser)
    loaded = load_model(parser.parse_args(["--weights", str(tmp_path)]))
    images = noise(2, 3, 28, 28, seed=0)
    with torch.no_grad():
        assert_close(loaded.classifier(images), theirs(images).logits)
