"""Advice of the program, and of what it verifies."""

from __future__ import annotations

import re
import subprocess
import zipfile

import pytest
from timm import create_model

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.proof.verify.sources import find
from tests.support.advice import Table

TIMM = "timm:vit_tiny_patch16_224"

CASES = Table()
case = CASES.add


def heatmap(lab, *arguments):
    lab.typed("heatmap", *arguments, "-o", lab.folder / "out", "--weights", lab.weights)


def figure(lab, *arguments):
    lab.typed("figure", *arguments, "-o", lab.folder / "a.pdf", "--weights", lab.weights)


def refused(lab, command):
    """The other command gives the same advice."""
    with pytest.raises(InvalidInputError, match="Name one, or use --example"):
        command(lab)


def explore(lab, *arguments):
    lab.typed("explore", *arguments, "-o", lab.folder / "a.html", "--weights", lab.weights)


case(
    "apps/cli",
    "Name one, or use --example.",
    heatmap,
    lambda lab: (
        heatmap(lab, lab.image),
        heatmap(lab, "--example", "--image-size", 8),
        refused(lab, figure),
        figure(lab, lab.image),
        figure(lab, "--example", "--image-size", 8),
    ),
)
case(
    "apps/cli",
    "Name one, or use --example. A page shows one image",
    explore,
    lambda lab: (
        explore(lab, lab.image),
        explore(lab, "--example", "--image-size", 8),
    ),
)
case(
    "apps/cli",
    "Name the tokens one by one, or see every token with `dinov2-attn explore`",
    lambda lab: heatmap(lab, lab.image, "--queries", "patches"),
    lambda lab: (
        heatmap(lab, lab.image, "--queries", "cls", "0,0", "1,2"),
        explore(lab, lab.image),
    ),
)
case(
    "apps/cli",
    "Give N for the short side, or height and width",
    lambda lab: heatmap(lab, lab.image, "--image-size", 8, 8, 8),
    lambda lab: (
        heatmap(lab, lab.image, "--image-size", 8),
        heatmap(lab, lab.image, "--image-size", 8, 12),
    ),
)
case(
    "apps/cli",
    "Leave it out: a name tells",
    lambda lab: lab.heatmap("--random-weights", "--image-size", 28, "--num-heads", 2),
    lambda lab: lab.heatmap("--random-weights", "--image-size", 28),
)
case(
    "apps/cli",
    "Leave it out.",
    lambda lab: lab.heatmap("--random-weights", "--image-size", 28, "--key", "teacher"),
    lambda lab: lab.heatmap("--random-weights", "--image-size", 28),
)
case(
    "apps/cli",
    "Leave the options out: the file states them",
    lambda lab: lab.heatmap("--patch-size", 4, "--arch", "vit_base", weights=lab.weights),
    lambda lab: lab.heatmap(weights=lab.weights),
)
case(
    "apps/cli",
    "Try --device cpu",
    lambda lab: lab.heatmap("--device", "gpu", weights=lab.weights),
    lambda lab: lab.heatmap("--device", "cpu", weights=lab.weights),
)


def demo(lab, seed):
    lab.typed("demo", "-o", lab.folder / "demo", "--count", 1, "--seed", seed)


case(
    "apps/cli",
    "Choose a smaller --seed",
    lambda lab: demo(lab, 10**9),
    lambda lab: demo(lab, 0),
)


case(
    "apps/cli",
    "Name its images. `dinov2-attn extract` takes folders",
    lambda lab: explore(lab, photos(lab)),
    lambda lab: (
        explore(lab, photos(lab) / "a.png"),
        lab.typed("extract", photos(lab), "-o", lab.folder / "e", "--weights", lab.weights),
    ),
)
case(
    "apps/cli",
    "Check the path.",
    lambda lab: heatmap(lab, lab.image.with_name("photgraph.png")),
    lambda lab: heatmap(lab, re.search(r"Did you mean (.+)\?$", lab.hint)[1]),
)
case(
    "apps/cli",
    "Name another one",
    lambda lab: lab.heatmap(weights=lab.weights, output=lab.image.name),
    lambda lab: lab.heatmap(weights=lab.weights),
)
case(
    "apps/cli",
    "Name others, or all",
    lambda lab: lab.heatmap("--random-weights", "--image-size", 28, "--layers", 12),
    lambda lab: (
        lab.heatmap("--random-weights", "--image-size", 28, "--layers", 11),
        lab.heatmap("--random-weights", "--image-size", 28, "--layers", "all"),
    ),
)
case(
    "apps/cli",
    "Name another file, or remove those",
    lambda lab: (
        figure(lab, lab.image),
        lab.typed("figure", lab.image, "-o", lab.folder / "a.svg", "--weights", lab.weights,
                  "--width", 5),
    ),
    lambda lab: (
        lab.typed("figure", lab.image, "-o", lab.folder / "b.svg", "--weights", lab.weights,
                  "--width", 5),
        (lab.folder / "a.pdf").unlink(),
        lab.typed("figure", lab.image, "-o", lab.folder / "a.svg", "--weights", lab.weights,
                  "--width", 5),
    ),
)  # fmt: skip


def photos(lab):
    return lab.written("photos/a.png", lab.image.read_bytes()).parent


def drawn_twice(lab, spoil):
    lab.heatmap("--overview", weights=lab.weights)
    spoil(lab.folder / "out")
    lab.heatmap(weights=lab.weights)


case(
    "apps/viz",
    "Name another output, or move that file",
    lambda lab: drawn_twice(lab, lambda out: (out / "run.json").write_text("mine")),
    lambda lab: (
        lab.heatmap(weights=lab.weights, output="other"),
        (lab.folder / "out" / "run.json").rename(lab.folder / "mine.json"),
        lab.heatmap(weights=lab.weights),
    ),
)
case(
    "apps/viz",
    "Name another folder, or move what you changed",
    lambda lab: drawn_twice(lab, lambda out: (out / "layers.png").write_bytes(b"mine")),
    lambda lab: (
        lab.heatmap(weights=lab.weights, output="other"),
        (lab.folder / "out" / "layers.png").rename(lab.folder / "mine.png"),
        lab.heatmap(weights=lab.weights),
    ),
)
case(
    "apps/weights",
    "Try ",
    lambda lab: lab.heatmap("--model", TIMM[:-1], "--random-weights", "--image-size", 16),
    lambda lab: lab.heatmap(
        "--model",
        "timm:" + re.search(r"Try (\S+?)( or .*)?[.]$", lab.hint)[1],
        "--random-weights",
        "--image-size",
        224,
    ),
)
case(
    "apps/weights",
    "Name the model that was saved there",
    lambda lab: lab.heatmap("--model", "timm:vit_small_patch16_224", weights=of_timm(lab)),
    lambda lab: lab.heatmap("--model", TIMM, "--image-size", 16, weights=of_timm(lab)),
)


def of_timm(lab):
    return lab.saved(create_model(TIMM.removeprefix("timm:")).state_dict())


# What is verified


def scratch(lab, name):
    lab.path(f"{name}/x")
    return lab.folder / name


def copy_of_the_code(lab, name="mine/dinov2", classes="MemEffAttention"):
    """Write what a copy of DINOv2's layers is known by; return the folder that it is in."""
    for module in ("attention", "block"):
        lab.path(f"checkout/{name}/layers/{module}.py").write_text(f"class {classes}: ...\n")
    return lab.folder / "checkout"


case(
    "proof/verify",
    "Name the package that holds it: --package NAME",
    lambda lab: lab.typed("verify", copy_of_the_code(lab, "mine", "Weights")),
    lambda lab: find(str(lab.folder / "checkout"), "mine", scratch(lab, "s"))[0].package == "mine",
)


def as_text(lab):
    return lab.written("mine.whl", b"no wheel")


case(
    "proof/verify",
    "Name the checkout's folder",
    lambda lab: lab.typed("verify", as_text(lab)),
    lambda lab: bool(find(str(copy_of_the_code(lab)), None, scratch(lab, "s"))),
)


def git(lab, *arguments):
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    subprocess.run(["git", "-C", lab.folder / "checkout", *me, *arguments], check=True)


def clone(lab):
    """Commit a copy of the code, and return the clone."""
    checkout = copy_of_the_code(lab, "dinov2")
    git(lab, "init", "-q")
    git(lab, "add", ".")
    git(lab, "commit", "-q", "-m", "a copy")
    return checkout


def wheel(lab):
    """Zip a copy of the code."""
    checkout = copy_of_the_code(lab)
    with zipfile.ZipFile(lab.path("mine.whl"), "w") as archive:
        for path in checkout.rglob("*.py"):
            archive.write(path, path.relative_to(checkout))
    return lab.folder / "mine.whl"


case(
    "proof/verify",
    "Name a folder, a clone with @REVISION",
    lambda lab: lab.typed("verify", lab.folder / "absent"),
    lambda lab: (
        find(str(copy_of_the_code(lab)), None, scratch(lab, "a")),
        find(f"{clone(lab)}@HEAD", None, scratch(lab, "b"))[0].unpack(),
        find(f"file://{lab.folder}/checkout", None, scratch(lab, "c"))[0].unpack(),
    ),
)


def with_a_link_outside(lab):
    (copy_of_the_code(lab, "dinov2") / "dinov2" / "outside").symlink_to("/")
    clone(lab)
    find(f"{lab.folder}/checkout@HEAD", None, scratch(lab, "a"))[0].unpack()


case(
    "proof/verify",
    "Check it out, inspect it, and name that folder",
    with_a_link_outside,
    lambda lab: find(f"{lab.folder}/checkout", None, scratch(lab, "b"))[0].unpack(),
)


case(
    "apps/cli",
    "or name one model",
    lambda lab: heatmap(lab, lab.image, "--weights", lab.weights, "--overview"),
    lambda lab: [
        heatmap(lab, lab.image, "--weights", lab.weights),
        heatmap(lab, lab.image, "--overview"),
    ],
)


case(
    "apps/cli",
    "out, or name images",
    lambda lab: heatmap(lab, lab.frames, "--overview"),
    lambda lab: heatmap(lab, lab.image, "--overview"),
)

case(
    "apps/cli",
    "out: pictures of images show every head",
    lambda lab: heatmap(lab, lab.image, "--head", "1"),
    lambda lab: heatmap(lab, lab.image),
)


# What argparse refuses, and proposes: the command, the option and a wrong value of it


# What is explained


case(
    "apps/cli",
    "Say what to explain",
    lambda lab: heatmap(lab, lab.image, "--method", "chefer"),
    lambda lab: heatmap(lab, lab.image, "--method", "chefer", "--target", "1,2"),
)
case(
    "apps/cli",
    "Choose one such as --model dinov2_vits14_lc",
    lambda lab: heatmap(lab, lab.image, "--target", 281),
    lambda lab: (
        heatmap(lab, lab.image, "--target", "1,2"),
        with_classes(lab, 281),
    ),
)
case(
    "apps/cli",
    "Classes count from 0.",
    lambda lab: with_classes(lab, 1000),
    lambda lab: with_classes(lab, 999),
)


def with_classes(lab, number):
    model = ("--model", "dinov2_vits14_lc", "--random-weights")
    lab.heatmap(*model, "--image-size", 28, "--target", number)


PROPOSED = [
    ("heatmap", "--layers", "last"),
    ("heatmap", "--threshold", "1.5"),
    ("heatmap", "--alpha", "much"),
    ("heatmap", "--range", "7,3"),
    ("heatmap", "--mean", "grey"),
    ("heatmap", "--std", "grey"),
    ("explore", "--layers", "last"),
    ("explore", "--max-mb", "0"),
    ("extract", "--layers", "last"),
    ("extract", "--grid", "16"),
    ("extract", "--workers", "-1"),
]

case(
    "apps/cli",
    "Choose one of these, or mean",
    lambda lab: figure(lab, lab.image, "--columns", "photo,mean,99"),
    lambda lab: figure(lab, lab.image, "--columns", "photo,mean,0"),
)
